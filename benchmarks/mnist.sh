#!/usr/bin/env bash
# Gaussian processes and objectives on MNIST by the same budget: one network, data order, optimiser and number of steps.
# docs/results.md has the table; benchmarks/mnist_plot.py draws it.
#
#   benchmarks/mnist.sh FOLDER [NAME...]      e.g.  benchmarks/mnist.sh runs/mnist edm flow
#
# Runs already there are continued or only scored again. Each writes FOLDER/NAME/{bound,ode}.json.
set -euo pipefail
folder=$1
shift
wanted=${*:-simple elbo v_min_snr v_sigmoid edm edm2 flow flow_logit_normal hybrid monotone laplace adaptive}

for name in $wanted; do
    case $name in
        simple) own="" ;; # DDPM: noise, unit weight, uniform times
        elbo) own="--config.denoiser.kind=v --config.objective.name=elbo" ;;
        v_min_snr) own="--config.denoiser.kind=v --config.objective.options.error=noise
            --config.objective.options.weighting=min_snr" ;;
        v_sigmoid) own="--config.denoiser.kind=v --config.objective.options.error=noise
            --config.objective.options.weighting=sigmoid --config.objective.options.measure=log_snr" ;;
        edm) own="--config.process.schedule=edm --config.denoiser.kind=edm
            --config.objective.options.density=log_normal_sigma --config.sample.grid=karras" ;;
        edm2) own="--config.process.schedule=edm --config.denoiser.kind=edm
            --config.objective.name=learned_uncertainty --config.objective.options.density=log_normal_sigma
            --config.sample.grid=karras" ;;
        flow) own="--config.process.schedule=cond_ot --config.denoiser.kind=velocity" ;;
        flow_logit_normal) own="--config.process.schedule=cond_ot --config.denoiser.kind=velocity
            --config.objective.options.density=logit_normal" ;;
        hybrid) own="--config.process.name=learned_variance --config.objective.name=ddpm_hybrid --config.objective.options.end=0.002
            --config.objective.options.steps=100" ;;
        monotone) own="--config.process.schedule=monotone --config.denoiser.kind=v
            --config.objective.name=learned_elbo" ;;
        laplace) own="--config.denoiser.kind=v --config.objective.options.density=laplace" ;;
        adaptive) own="--config.denoiser.kind=v --config.objective.name=adaptive
            --config.objective.options.weighting=sigmoid" ;;
        *)
            echo "unknown: $name" >&2
            exit 2
            ;;
    esac
    # shellcheck disable=SC2086
    python -m ddjax train --config configs/mnist.py --workdir "$folder/$name" --quiet $own
    python -m ddjax eval --workdir "$folder/$name" --labels 200 --out "$folder/$name/bound.json" \
        --config.eval.max_examples=256
    python -m ddjax eval --workdir "$folder/$name" --likelihood ode --out "$folder/$name/ode.json" \
        --config.eval.max_examples=64 --config.eval.steps=24 --config.eval.probes=2 --config.eval.batch_size=64
done
