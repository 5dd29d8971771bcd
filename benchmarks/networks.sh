#!/usr/bin/env bash
# Networks side by side. Those of images on the digits by one budget: data order, objective (EDM), optimiser, number of
# steps, and about as many floating-point operations a step (7 to 12 billion); text, tables and graphs by their configs.
# docs/results.md has the tables.
#
#   benchmarks/networks.sh FOLDER [NAME...]      e.g.  benchmarks/networks.sh runs/networks dit uvit
#   STEPS=0 benchmarks/networks.sh FOLDER        their training step alone, of all
#
# Runs already there are continued or only scored again. Each writes FOLDER/NAME/{step,bound}.json.
set -euo pipefail
folder=$1
shift
steps=${STEPS:-600}
images="dit uvit unet dico state_space edm2 multi_resolution diffit diffussm dit_linear dit_generated dit_experts dit_pooled"
wanted=${*:-$images}
[ "$steps" != 0 ] || wanted=${*:-$images inf_dit text table low_rank neural_process mixed_table graph}

for name in $wanted; do
    config=configs/digits_gaussian.py network=$name more=()
    case $name in
        dit) options="{'width': 96, 'depth': 3, 'heads': 4, 'patch': 1}" ;;
        dit_linear) network=dit options="{'width': 96, 'depth': 3, 'heads': 4, 'patch': 1, 'attention': 'linear'}" ;;
        dit_experts) network=dit options="{'width': 96, 'depth': 3, 'heads': 4, 'patch': 1, 'mlp': 'experts', 'mlp_ratio': 1, 'experts': {'experts': 8, 'top_k': 2}}" ;;
        dit_pooled) network=dit options="{'width': 96, 'depth': 3, 'heads': 4, 'patch': 1, 'mlp': 'pooled', 'mlp_ratio': 2, 'experts': {'experts': 8}}" ;;
        dit_generated) network=dit options="{'width': 96, 'depth': 3, 'heads': 4, 'patch': 1, 'conditioning': 'weights'}" ;;
        uvit) options="{'width': 80, 'depth': 5, 'heads': 4, 'patch': 1}" ;;
        unet) options="{'design': 'ddpm++', 'width': 40, 'multipliers': (1, 2), 'blocks': 1, 'attend_at': (4,), 'time_scale': 1.0}" ;;
        edm2) options="{'width': 40, 'multipliers': (1, 2), 'blocks': 1, 'attend_at': (4,), 'head_width': 20}" ;;
        dico) options="{'width': 48, 'stages': (1, 1, 2, 1, 1)}" ;;
        state_space) options="{'width': 96, 'depth': 5, 'patch': 1}" ;;
        multi_resolution) options="{'widths': (128, 64), 'depths': (5, 3), 'heads': 4, 'patches': (2, 1)}" ;;
        diffit) options="{'width': 56, 'multipliers': (1, 2), 'blocks': 1, 'heads': 4}" ;;
        diffussm) options="{'width': 96, 'depth': 4, 'patch': 1}" ;;
        text) config=configs/shakespeare.py options= ;;
        mixed_table) config=configs/adult.py options= ;;
        graph) config=configs/graphs.py options= ;;
        inf_dit) config=configs/digits_super_resolution.py options= ;;
        table | low_rank) # the numbers of a table, without its symbols
            mkdir -p "$folder/$name"
            python - "$folder/$name/rows.npy" <<'PYTHON'
import sys

import numpy as np

from ddjax import data

table = data.load("../shared/data/tabular/california_housing.csv", "train", missing="drop")
np.save(sys.argv[1], table[:]["x0"]["numbers"])
PYTHON
            more=(--config.data.name="$folder/$name/rows.npy" --config.process.data_std=1.0)
            network=tabular options="{'width': 128, 'hidden': (512, 512)}"
            [ "$name" = table ] || { network=low_rank options="{'rank': 4}" && more+=(--config.denoiser.kind=x0); }
            ;;
        neural_process) # functions of one number, at 60 places of their own
            mkdir -p "$folder/$name"
            python - "$folder/$name/functions.npz" <<'PYTHON'
import sys

import numpy as np

rng = np.random.default_rng(0)
places = np.sort(rng.uniform(-2, 2, (1024, 60, 1)), axis=1)
kernels = np.exp(-2 * (places - places.swapaxes(1, 2)) ** 2) + 1e-4 * np.eye(60)
values = np.einsum("nij,nj->ni", np.linalg.cholesky(kernels), rng.normal(size=(1024, 60)))
np.savez(sys.argv[1], x0=values.astype(np.float32), places=places.astype(np.float32))
PYTHON
            more=(--config.data.name="$folder/$name/functions.npz" --config.process.data_std=1.0
                --config.data.options="{'beside': ['places']}" --config.data.conditions="{'points': 'places'}")
            options="{'width': 64, 'depth': 4, 'heads': 4}"
            ;;
        *)
            echo "unknown: $name" >&2
            exit 2
            ;;
    esac
    own=(--config "$config" "${more[@]}")
    [ -z "$options" ] || own+=(--config.denoiser.name="$network" --config.denoiser.options="$options")
    mkdir -p "$folder/$name"
    python -m ddjax bench train "${own[@]}" --steps 12 --out "$folder/$name/step.json"
    case " $images " in *" $name "*) ;; *) continue ;; esac # the others are not judged by digits
    [ "$steps" != 0 ] || continue
    own+=(--config.train.steps="$steps" --config.train.eval_every=0 --config.train.sample_every="$steps")
    python -m ddjax train "${own[@]}" --workdir "$folder/$name/run" --quiet
    python -m ddjax eval --workdir "$folder/$name/run" --labels 200 --out "$folder/$name/bound.json"
done
