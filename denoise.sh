#!/bin/sh
# Denoise with the DEFAULTS of denoise.py; a flag given here overrides its value.
exec python -u "$(dirname "$0")/denoise.py" "$@"
