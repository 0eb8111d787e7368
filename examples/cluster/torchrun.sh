#!/bin/bash
# Trains one model on one node or on several that no scheduler manages, a process on each GPU. On one node:
#
#     GPUS=8 bash torchrun.sh runs/mine data.dir=data/mine model=110m
#
# On several nodes the same command is started on each of them, with its number and the address of the first one:
#
#     GPUS=8 NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash torchrun.sh runs/mine data.dir=data/mine model=110m
#     GPUS=8 NODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash torchrun.sh runs/mine data.dir=data/mine model=110m
#
# The first argument is the run folder. It and the data must lie where every node sees them. The other arguments are
# those of `python -m bitnet_lit.train`. A run that was stopped goes on when the same commands are given again: where the
# run folder holds a checkpoint, of the other arguments only allow= is read. On another number of nodes or GPUs it goes
# on with the same sequences in a step.
#
# A run that is complete is left as it is, and the status is 0. Where resume= is typed, all arguments are read: a longer
# trainer.max_steps trains a complete run further.

run=${1:?the first argument is the run folder}
shift

figure() { # of metrics.json, which is written when a run is complete
    sed -n 's/.*"'"$1"'": *\([0-9]*\).*/\1/p' "$run/metrics.json"
}

is_longer= # resume= is typed
[[ " $* " == *" resume="* ]] && is_longer=1
if [ -e "$run/metrics.json" ]; then
    steps=$(figure steps)
    is_reached= # the length that is typed, as 60, 60_000 or 6e4
    for argument in "$@"; do
        case $argument in
            trainer.max_steps=*) reached=$steps ;;
            trainer.max_tokens=*) reached=$(figure tokens) ;;
            *) continue ;;
        esac
        length=${argument#*=}
        length=${length//_/}
        [[ $length =~ ^[0-9.]+(e\+?[0-9]+)?$ && $(LC_ALL=C printf %.0f "$length") -le $reached ]] && is_reached=1
    done
    if [ ! "$is_longer" ] || [ "$is_reached" ]; then
        echo "$run: complete at step $steps. To go on: bash torchrun.sh $run resume=$run trainer.max_steps=<more>" \
            "schedule.total_steps=<more> (this stretches the learning rate's curve, and $steps keeps it)"
        exit 0
    fi
fi

if [ "$is_longer" ]; then
    arguments=("$@")
elif [ -e "$run/checkpoints/last.ckpt" ]; then
    arguments=("resume=$run")
    for argument in "$@"; do
        [[ $argument == allow=* ]] && arguments+=("$argument") # classes of one's own that the run's config names
    done
else
    arguments=("hydra.run.dir=$run" "$@")
fi
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS:-1}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m bitnet_lit.train "${arguments[@]}" "trainer.devices=${GPUS:-1}" "trainer.num_nodes=${NODES:-1}"
