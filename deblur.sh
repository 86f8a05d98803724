#!/bin/sh
# Deblur; a flag given after the script's name wins over the one here.
# --recipe fast: 500 steps; paper: the published training, 150,000, days on a CPU.
exec python -u "$(dirname "$0")/deblur.py" \
    --path camera \
    --recipe fast \
    --sigma 10 \
    --bs 1 \
    --seed 0 \
    --test_frequency 1000 \
    --num_prediction 100 \
    --model_type deblur \
    --log_path ./logs/deblur/log.txt \
    --device auto \
    "$@"
