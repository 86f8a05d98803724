#!/bin/sh
# Denoise; a flag given after the script's name wins over the one here. Steps,
# optimiser and learning rate are the recipe's: a value here would win over it.
exec python -u "$(dirname "$0")/denoise.py" \
    --path camera \
    --recipe paper \
    --sigma 25 \
    --bs 1 \
    --seed 0 \
    --test_frequency 1000 \
    --num_prediction 100 \
    --model_type denoise \
    --log_path ./logs/denoise/log.txt \
    --device auto \
    "$@"
