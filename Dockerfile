# The server, and nothing else: one static binary in an empty image, no shell,
# no libraries. Build it with `make image`, which links the binary and lays out
# target/image first; no registry is asked for anything.
#
# HTTPS to an S3 server needs no certificate files: the roots of the web PKI
# are compiled in. (A private authority is therefore not trusted yet.)
#
# The server runs as root, because the trees it moves belong to the users that
# the containers run as, with these capabilities and no others
# (`--cap-drop ALL --cap-add …`, as compose.yaml does):
#
#   CHOWN         hands state, secrets and comm directories to a container's user
#   DAC_OVERRIDE  reads and writes below those directories, which are 0700
#   FOWNER        sets modes and times of files it does not own
#   FSETID        keeps set-group-ID bits when it restores modes
#
# Access to the Docker socket is access to the host as root; the capabilities
# limit mistakes, not a server that was taken over.
#
# The engine binds host paths into the containers that the server creates, so
# the server must see its directories under the same paths as the host does.
FROM scratch
LABEL org.opencontainers.image.title="boilerhouse" \
      org.opencontainers.image.description="Container pool orchestrator" \
      org.opencontainers.image.licenses="MIT"
# /usr/bin/boilerhouse, /etc/boilerhouse/{workloads,scripts}, /LICENSE
COPY target/image/ /
# `workloads` and `scripts` are looked for where the server starts.
WORKDIR /etc/boilerhouse
ENTRYPOINT ["/usr/bin/boilerhouse"]
CMD ["serve"]
STOPSIGNAL SIGTERM
