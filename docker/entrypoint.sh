#!/bin/sh
# Says what would keep the service from working in this container, then becomes the command.
set -eu

if [ "${1:-} ${2:-}" = "lora-mvp serve" ]; then
    for folder in data models outputs state; do
        if [ ! -d "$folder" ] || [ ! -w "$folder" ] || [ ! -x "$folder" ]; then
            echo "error: $PWD/$folder cannot be written by the user $(id -u):$(id -g). Give the folder to that user" \
                "(chown -R $(id -u):$(id -g) FOLDER), or set LORA_MVP_USER to UID:GID of its owner." >&2
            exit 2
        fi
    done
    if [ ! -e "${NVIDIA_DEVICE:-/dev/nvidiactl}" ] && [ ! -e /dev/dxg ]; then
        echo "There is no GPU in this container: trainings run on the CPU, in hours where a GPU takes minutes. On a host with" \
            "NVIDIA GPUs: docker compose -f docker/compose.yaml -f docker/compose.gpu.yaml up --build" >&2
    fi
fi

exec "$@"
