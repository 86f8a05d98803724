#!/bin/sh
# Denoise: the values stand in denoise.py, its DEFAULTS; a flag given here wins over them.
exec python -u "$(dirname "$0")/denoise.py" "$@"
