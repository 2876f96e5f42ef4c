"""Reads state from a store as the documentation of the format says (src/state/snapshot/mod.rs,
src/seal/body.rs), and shares no code with the server: what is missing there is missing here.

    reader.py STORE TENANT WORKLOAD INTO [MASTER_KEY_HEX]

STORE is a directory with one file an object. Restores the newest tree into the directory INTO
and prints the kinds of the records, oldest first. Needs root, and zstd(1).
"""

import base64
import json
import os
import struct
import subprocess
import sys

# --- blake3, as its specification says -------------------------------------

IV = [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19]
PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
CHUNK_START, CHUNK_END, PARENT, ROOT, KEYED, DERIVE_CONTEXT, DERIVE_MATERIAL = 1, 2, 4, 8, 16, 32, 64
LANES = [
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
]
M32 = 0xFFFFFFFF


def compress(chain, block, counter, length, flags):
    v = list(chain) + IV[:4] + [counter & M32, counter >> 32, length, flags]
    m = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    for turn in range(7):
        for n, (a, b, c, d) in enumerate(LANES):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + m[2 * n]) & M32
            vd ^= va
            vd = (vd >> 16 | vd << 16) & M32
            vc = (vc + vd) & M32
            vb ^= vc
            vb = (vb >> 12 | vb << 20) & M32
            va = (va + vb + m[2 * n + 1]) & M32
            vd ^= va
            vd = (vd >> 8 | vd << 24) & M32
            vc = (vc + vd) & M32
            vb ^= vc
            v[a], v[b], v[c], v[d] = va, (vb >> 7 | vb << 25) & M32, vc, vd
        m = [m[i] for i in PERMUTATION]
    return [v[i] ^ v[i + 8] for i in range(8)]


def node(content, key, flags, counter):
    """The last compression of a subtree, without its flags: (chain, block, counter, length, flags)."""
    if len(content) <= 1024:
        chain, start = key, CHUNK_START
        blocks = [content[at:at + 64] for at in range(0, len(content), 64)] or [b""]
        for block in blocks[:-1]:
            chain = compress(chain, block, counter, 64, flags | start)
            start = 0
        return chain, blocks[-1], counter, len(blocks[-1]), flags | start | CHUNK_END
    left = 1024
    while left * 2 < len(content):
        left *= 2
    halves = node(content[:left], key, flags, counter), node(content[left:], key, flags, counter + left // 1024)
    block = b"".join(struct.pack("<8I", *compress(*half)) for half in halves)
    return key, block, 0, 64, flags | PARENT


def blake3(content, key=IV, flags=0):
    chain, block, _, length, flags = node(content, key, flags, 0)
    return struct.pack("<8I", *compress(chain, block, 0, length, flags | ROOT))


def keyed_hash(key, content):
    return blake3(content, list(struct.unpack("<8I", key)), KEYED)


def derive_key(context, material):
    key = blake3(context.encode(), IV, DERIVE_CONTEXT)
    return blake3(material, list(struct.unpack("<8I", key)), DERIVE_MATERIAL)


# --- XChaCha20-Poly1305 ----------------------------------------------------

def quarters(v):
    for _ in range(10):
        for a, b, c, d in LANES:
            v[a] = (v[a] + v[b]) & M32; v[d] ^= v[a]; v[d] = (v[d] << 16 | v[d] >> 16) & M32
            v[c] = (v[c] + v[d]) & M32; v[b] ^= v[c]; v[b] = (v[b] << 12 | v[b] >> 20) & M32
            v[a] = (v[a] + v[b]) & M32; v[d] ^= v[a]; v[d] = (v[d] << 8 | v[d] >> 24) & M32
            v[c] = (v[c] + v[d]) & M32; v[b] ^= v[c]; v[b] = (v[b] << 7 | v[b] >> 25) & M32
    return v


CONSTANTS = list(struct.unpack("<4I", b"expand 32-byte k"))


def key_stream(key, nonce, counter):
    begin = CONSTANTS + list(struct.unpack("<8I", key)) + [counter] + list(struct.unpack("<3I", nonce))
    return struct.pack("<16I", *((a + b) & M32 for a, b in zip(quarters(list(begin)), begin)))


def open_sealed(key, nonce, text, tag, authenticated):
    mixed = quarters(CONSTANTS + list(struct.unpack("<8I", key)) + list(struct.unpack("<4I", nonce[:16])))
    key, nonce = struct.pack("<8I", *(mixed[:4] + mixed[12:])), b"\0\0\0\0" + nonce[16:]
    once = key_stream(key, nonce, 0)
    r = int.from_bytes(once[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    padded = b"".join(part + bytes(-len(part) % 16) for part in (authenticated, text))
    padded += struct.pack("<QQ", len(authenticated), len(text))
    total = 0
    for at in range(0, len(padded), 16):
        total = (total + int.from_bytes(padded[at:at + 16] + b"\1", "little")) * r % ((1 << 130) - 5)
    total = (total + int.from_bytes(once[16:32], "little")) & ((1 << 128) - 1)
    assert total.to_bytes(16, "little") == tag, "it was changed or moved since it was sealed"
    blocks = (key_stream(key, nonce, 1 + at // 64) for at in range(0, len(text), 64))
    return bytes(a ^ b for a, b in zip(text, b"".join(blocks)))


# --- the format ------------------------------------------------------------

def unzstd(content):
    return subprocess.run(["zstd", "-dcq"], input=content, stdout=subprocess.PIPE, check=True).stdout


def raw(text):
    return base64.b64decode(text["base64"]) if isinstance(text, dict) else text.encode()


def context(*parts):
    return b"".join(struct.pack("<Q", len(part)) + part.encode() for part in parts)


class Store:
    def __init__(self, root, tenant, workload, master):
        self.whose = (tenant, workload)
        self.digest = blake3(tenant.encode() + b"\0" + workload.encode() + b"\0")[:16].hex()
        self.root = os.path.join(root, "t", self.digest)
        self.key = self.key_id = None
        if master:
            self.key = keyed_hash(derive_key("boilerhouse 2026-11 tenant state", master), context(*self.whose))
            self.key_id = derive_key("boilerhouse 2026-01 tenant secrets key id", master)[:8]

    def read(self, name):
        with open(os.path.join(self.root, name), "rb") as file:
            return file.read()

    def object(self, name, is_sealed):
        body = self.read(name)
        kind, rest = name.split("/")
        assert rest.split("-")[1] == blake3(body).hex(), f"{name} does not have the bytes of its name"
        if not is_sealed:
            return body
        assert body[:4] == b"bhs\1" and self.key, f"{name} is sealed"
        assert body[4:12] == self.key_id, f"{name} is sealed with another key"
        role = context(kind, self.digest)
        return open_sealed(self.key, body[12:36], body[36:-16], body[-16:], body[:4] + role)

    def records(self):
        """All records, oldest first."""
        found = []
        for name in sorted(os.listdir(os.path.join(self.root, "r")), reverse=True):
            record = json.loads(self.read("r/" + name))
            assert record["version"] in (0, 1)
            assert record["number"] == (1 << 64) - 1 - int(name, 16)
            assert (record["tenant"], record["workload"]) == self.whose
            found.append(record)
        return found

    def manifest(self, name):
        is_sealed = self.read(name).startswith(b"bhs")
        manifest = json.loads(unzstd(self.object(name, is_sealed)))
        assert manifest["version"] in (0, 1) and (manifest["tenant"], manifest["workload"]) == self.whose
        return manifest

    def content(self, described):
        name = described["name"]
        content = self.object(name, described.get("sealed", False))
        if described.get("encoding", "zstd" if name.startswith("p/") else "plain") == "zstd":
            content = unzstd(content)
        assert len(content) == described["bytes"], f"{name} holds {len(content)} bytes"
        return content


def finish(path, meta, xattrs):
    os.chown(path, meta["uid"], meta["gid"], follow_symlinks=False)
    if not os.path.islink(path):
        is_dir = os.path.isdir(path)
        os.chmod(path, meta["mode"] if is_dir else meta["mode"] & ~0o6000)
        for name, value in xattrs:
            os.setxattr(path, raw(name), raw(value))
    seconds, nanoseconds = meta["modified"]
    time = seconds * 1_000_000_000 + nanoseconds
    os.utime(path, ns=(time, time), follow_symlinks=False)


def restore(store, manifest, into):
    contents = [store.content(described) for described in manifest["objects"]]
    into = os.fsencode(into)
    is_old = manifest["version"] == 0
    later = [(into, manifest["root"], manifest.get("root_xattrs", []))]
    for item in manifest["items"]:
        path, node = os.path.join(into, raw(item["path"])), item["node"]
        if node == "directory":
            os.mkdir(path)
            later.append((path, item["meta"], item.get("xattrs", [])))
            continue
        if "hard_link" in node:
            os.link(os.path.join(into, raw(node["hard_link"]["to"])), path, follow_symlinks=False)
            continue
        if "symlink" in node:
            os.symlink(raw(node["symlink"]["target"]), path)
        else:
            file = node["file"]
            parts = [contents[number][at:at + length] for number, at, length in file["pieces"]]
            data = b"".join(parts)
            is_in_chunks = any(manifest["objects"][piece[0]]["name"].startswith("c/") for piece in file["pieces"])
            if is_in_chunks and not is_old:
                digest = blake3(b"".join(blake3(part) for part in parts))
            else:
                digest = blake3(data)
            assert digest.hex() == file["digest"], f"{path} has another content"
            with open(path, "xb") as out:
                at = 0
                for offset, length in file.get("holes", []) + [[file["bytes"], 0]]:
                    out.seek(at)
                    out.write(data[:offset - at])
                    data, at = data[offset - at:], offset + length
                assert not data
                out.truncate(file["bytes"])
        finish(path, item["meta"], item.get("xattrs", []))
    for path, meta, xattrs in reversed(later):
        finish(path, meta, xattrs)


def main():
    root, tenant, workload, into = sys.argv[1:5]
    master = bytes.fromhex(sys.argv[5]) if len(sys.argv) > 5 else None
    store = Store(root, tenant, workload, master)
    records = store.records()
    newest = records[-1]
    tree = newest if newest["version"] == 0 else newest["tree"]
    restore(store, store.manifest(tree["manifest"]), into)
    print(" ".join(record.get("kind", "snapshot") for record in records))


main()
