#!/bin/sh
# Denoise; a flag given after the script's name wins over the one here.
# --recipe fast: 500 steps; paper: the published training, 150,000, days on a CPU.
exec python -u "$(dirname "$0")/denoise.py" \
    --path camera \
    --recipe fast \
    --sigma 25 \
    --bs 1 \
    --seed 0 \
    --test_frequency 1000 \
    --num_prediction 100 \
    --model_type denoise \
    --log_path ./logs/denoise/log.txt \
    --device auto \
    "$@"
