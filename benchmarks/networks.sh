#!/usr/bin/env bash
# Networks for images on the digits by one budget: data order, objective (EDM), optimiser, number of steps, and about as
# many floating-point operations a step (7 to 12 billion). docs/results.md has the table.
#
#   benchmarks/networks.sh FOLDER [NAME...]      e.g.  benchmarks/networks.sh runs/networks dit uvit
#
# Runs already there are continued or only scored again. Each writes FOLDER/NAME/{step,bound}.json.
set -euo pipefail
folder=$1
shift
wanted=${*:-dit uvit unet dico state_space}
steps=${STEPS:-600}

for name in $wanted; do
    case $name in
        dit) options="{'width': 96, 'depth': 3, 'heads': 4, 'patch': 1}" ;;
        uvit) options="{'width': 80, 'depth': 5, 'heads': 4, 'patch': 1}" ;;
        unet) options="{'design': 'ddpm++', 'width': 40, 'multipliers': (1, 2), 'blocks': 1, 'attend_at': (4,), 'time_scale': 1.0}" ;;
        dico) options="{'width': 48, 'stages': (1, 1, 2, 1, 1)}" ;;
        state_space) options="{'width': 96, 'depth': 5, 'patch': 1}" ;;
        *)
            echo "unknown: $name" >&2
            exit 2
            ;;
    esac
    own=(--config configs/digits_gaussian.py --config.denoiser.name="$name" --config.denoiser.options="$options"
        --config.train.steps="$steps" --config.train.eval_every=0 --config.train.sample_every="$steps")
    mkdir -p "$folder/$name"
    python -m ddjax bench train "${own[@]}" --steps 8 --out "$folder/$name/step.json"
    python -m ddjax train "${own[@]}" --workdir "$folder/$name/run" --quiet
    python -m ddjax eval --workdir "$folder/$name/run" --labels 200 --out "$folder/$name/bound.json"
done
