#!/usr/bin/env bash
# Whether the server in this container is ready: exit 0 if /health answers 200. Needs nothing but bash, so the image
# carries no HTTP client. Reads LORAMUX_PORT; a port given as a flag has to be set there too.
set -euo pipefail
exec 3<>"/dev/tcp/127.0.0.1/${LORAMUX_PORT:-8000}"
printf 'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
IFS=' ' read -r -t 4 _ status _ <&3
[ "$status" = 200 ]
