#!/bin/sh
# Deblur with the DEFAULTS of deblur.py; a flag given here overrides its value.
exec python -u "$(dirname "$0")/deblur.py" "$@"
