#!/usr/bin/env bash
# Discrete processes and objectives trained by the same budget: one network, data order, optimiser and number of steps
# per data set; only the process, what the network predicts and the objective differ. docs/results.md has the table.
#
#   benchmarks/equal_budget.sh FOLDER [NAME...]      e.g.  benchmarks/equal_budget.sh runs/budget digits_uniform
#
# Runs already there are continued or only scored again. Each writes FOLDER/NAME/eval.json.
set -euo pipefail
folder=$1
shift
wanted=${*:-digits_masked digits_uniform digits_hybrid digits_d3pm digits_flow_masked digits_flow_uniform \
    digits_blackout shakespeare_masked shakespeare_uniform shakespeare_hybrid shakespeare_flow_masked \
    shakespeare_flow_uniform}

digits="--config.denoiser.options.time=True --config.objective.name=elbo --config.train.steps=1500
    --config.train.eval_every=0 --config.train.sample_every=1500 --config.optimizer.learning_rate=2e-3"
shakespeare="--config.train.steps=1000"

for name in $wanted; do
    config=configs/${name%%_*}.py
    base=$shakespeare
    if [[ $name == digits_* ]]; then
        config=configs/digits_masked.py
        base=$digits
    fi
    case ${name#*_} in
        masked) own="" ;;
        uniform) own="--config.process.name=uniform --config.denoiser.kind=cavity" ;;
        hybrid) own="--config.process.name=hybrid --config.process.options.uniform_share=0.1 --config.denoiser.kind=cavity" ;;
        d3pm) own="--config.process.name=discretized_gaussian --config.process.options.steps=100
            --config.process.options.beta=(2e-3,0.3) --config.denoiser.kind=cavity" ;;
        flow_masked) own="--config.objective.name=cross_entropy" ;;
        flow_uniform) own="--config.process.name=uniform --config.objective.name=cross_entropy" ;;
        blackout) own="--config.process.name=thinning --config.denoiser.kind=deaths" ;;
        *)
            echo "unknown: $name" >&2
            exit 2
            ;;
    esac
    # shellcheck disable=SC2086
    python -m ddjax train --config "$config" --workdir "$folder/$name" --quiet $base $own
    python -m ddjax eval --workdir "$folder/$name" --out "$folder/$name/eval.json"
done
