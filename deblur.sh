#!/bin/sh
# Deblur: the values stand in deblur.py, its DEFAULTS; a flag given here wins over them.
exec python -u "$(dirname "$0")/deblur.py" "$@"
