/*
 * probe NUMBER [ARGUMENT...]   makes one system call and prints what the kernel
 *                              returned, e.g. -1 for EPERM
 * probe int80                  asks for the process id by the 32-bit entry (x86)
 *
 * An argument is a number, or any other text for a pointer to it. Without a C
 * library, so that nothing but the call itself is tested.
 */

static long call(long number, const long *a) {
    long result;
#if defined(__x86_64__)
    register long r10 __asm__("r10") = a[3];
    register long r8 __asm__("r8") = a[4];
    register long r9 __asm__("r9") = a[5];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a[0];
    register long x1 __asm__("x1") = a[1];
    register long x2 __asm__("x2") = a[2];
    register long x3 __asm__("x3") = a[3];
    register long x4 __asm__("x4") = a[4];
    register long x5 __asm__("x5") = a[5];
    __asm__ volatile("svc 0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    result = x0;
#else
#error "no probe for this processor"
#endif
    return result;
}

#if defined(__x86_64__)
enum { WRITE = 1, EXIT = 60 };
#else
enum { WRITE = 64, EXIT = 93 };
#endif

static void leave(long status) {
    const long a[6] = {status};
    call(EXIT, a);
    for (;;) {
    }
}

static void print(long value) {
    char text[24];
    int at = sizeof text;
    unsigned long rest = value < 0 ? 0UL - (unsigned long)value : (unsigned long)value;
    text[--at] = '\n';
    do {
        text[--at] = (char)('0' + rest % 10);
        rest /= 10;
    } while (rest);
    if (value < 0) text[--at] = '-';
    const long a[6] = {1, (long)(text + at), (long)sizeof text - at};
    call(WRITE, a);
}

static long argument(const char *text) {
    const char *at = text;
    int negative = *at == '-';
    unsigned long value = 0;
    if (negative) at++;
    if (!*at) return (long)text;
    for (; *at; at++) {
        if (*at < '0' || *at > '9') return (long)text;
        value = value * 10 + (unsigned long)(*at - '0');
    }
    return negative ? (long)(0UL - value) : (long)value;
}

__attribute__((used)) void probe(long *stack) {
    long count = stack[0];
    char **arguments = (char **)(stack + 1);
    long a[6] = {0};
    if (count < 2) leave(2);
#if defined(__x86_64__)
    if (arguments[1][0] == 'i') {
        long result;
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory");
        print(result);
        leave(0);
    }
#endif
    for (long i = 2; i < count && i < 8; i++) a[i - 2] = argument(arguments[i]);
    print(call(argument(arguments[1]), a));
    leave(0);
}

__asm__(".globl _start\n"
        "_start:\n"
#if defined(__x86_64__)
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call probe\n"
#else
        "    mov x0, sp\n"
        "    bl probe\n"
#endif
);
