#!/usr/bin/env bash
# Do two machines train what one does, and does a job survive the loss of one?
#
#     benchmarks/multi_node.sh [--quick]
#
# Two network namespaces joined by a virtual cable stand for two machines: each has its own interfaces, address and processes, and
# torchrun starts a process in each, which find one another over that cable (gloo). A run of one process gives the losses
# to compare with. Then, for DDP and for FSDP2: a run over both nodes; the same with the second node killed (every process of
# it at once, as when a machine dies), how long the first takes to end by itself, and both started again with ckpt_path=last.
# --quick: FSDP2 alone. Needs Linux, iproute2, util-linux and the right to make namespaces; where one is missing it says so and
# ends with 0. Nothing is left behind: the namespaces end with this script.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
strategies=(ddp fsdp)
[[ ${1-} == --quick ]] && strategies=(fsdp)

skip() {
    echo "SKIPPED multi_node: $1"
    exit 0
}

if [[ -z ${TILTMETER_INSIDE-} ]]; then
    for tool in ip unshare nsenter python; do
        command -v "$tool" >/dev/null || skip "no $tool on this machine"
    done
    apart=(--net --pid --fork --kill-child --mount-proc)
    if unshare --user --map-root-user "${apart[@]}" true 2>/dev/null; then
        apart=(--user --map-root-user "${apart[@]}")
    elif ! unshare "${apart[@]}" true 2>/dev/null; then
        skip "this machine makes no network and process namespaces ($(unshare --user --map-root-user --net true 2>&1 | tail -1))"
    fi
    TILTMETER_INSIDE=1 exec unshare "${apart[@]}" bash "$0" "$@"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 COLUMNS=160
addresses=(10.77.0.1 10.77.0.2)
port=29500
common=(
    "runs_root=$work/runs" logger=csv callbacks=geometry trainer.precision=32-true trainer.max_steps=8 trainer.val_check_interval=2
    model.architecture.hidden_size=32 model.architecture.intermediate_size=64 model.architecture.num_hidden_layers=2
    model.vocab_size=300 data.n_prompts=120 datamodule.val_pairs=20 datamodule.probe_pairs=10 base.max_epochs=1
    datamodule.pairs_per_step=13 datamodule.tokens_per_micro_batch=600
)

start_second_node() { # a fresh machine on the other end of a fresh cable
    unshare --net --pid --fork --kill-child --mount-proc sleep infinity 2>/dev/null &
    until second=$(pgrep -P $!); do sleep 0.1; done
    ip link add node0 type veth peer name node1 2>"$work/ip.log" || skip "no virtual cable could be made ($(tail -1 "$work/ip.log"))"
    ip link set node1 netns "$second"
    ip addr add "${addresses[0]}/24" dev node0
    ip link set node0 up
    on_second ip addr add "${addresses[1]}/24" dev node1
    on_second ip link set node1 up
    on_second ip link set lo up
}

on_second() { nsenter --target "$second" --net --pid --mount "$@"; }

torchrun_on() { # node, then arguments of train.py
    local node=$1
    shift
    GLOO_SOCKET_IFNAME="node$node" python -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --node_rank="$node" \
        --master_addr="${addresses[0]}" --master_port="$port" "$here/train.py" "${common[@]}" \
        trainer.accelerator=cpu trainer.devices=1 trainer.num_nodes=2 "$@" >"$work/node$node.log" 2>&1
}

start_both() { # arguments of train.py; sets first
    port=$((port + 1))
    export -f torchrun_on
    export work here port
    on_second bash -c "addresses=(${addresses[*]}); common=(${common[*]}); torchrun_on 1 $*" &
    torchrun_on 0 "$@" &
    first=$!
}

must_end_well() {
    wait "$first" || {
        tail -5 "$work/node0.log" "$work/node1.log" >&2
        echo "multi_node: $1 failed" >&2
        exit 1
    }
}

newest() { find "$work/runs/tiny_synthetic" -mindepth 1 -maxdepth 1 | sort | tail -1; }

largest_difference() { # of the losses of two runs
    python - "$1/metrics.csv" "$2/metrics.csv" <<'END'
import csv, sys
a, b = ([(r["step"], float(r["train/loss"])) for r in csv.DictReader(open(f)) if r.get("train/loss")] for f in sys.argv[1:])
assert [s for s, _ in a] == [s for s, _ in b] and len(a) == 8, (a, b)
print(f"{max(abs(x - y) for (_, x), (_, y) in zip(a, b)):.2g}")
END
}

ip link set lo up
python "$here/train.py" "${common[@]}" >"$work/single.log" 2>&1 || { tail -5 "$work/single.log" >&2; exit 1; }
single=$(newest)
echo
echo "| strategy | largest difference of a loss, two nodes − one process | the same after a loss of node 2 and a resume | node 1 ended by itself after, s |"
echo "|----------|------:|------:|------:|"
result=RESULT
for strategy in "${strategies[@]}"; do
    start_second_node
    start_both "trainer=$strategy"
    must_end_well "trainer=$strategy on two nodes"
    plain=$(largest_difference "$single" "$(newest)")
    before=$(newest)
    start_both "trainer=$strategy"
    until [[ $(newest) != "$before" && -e $(newest)/checkpoints/last.ckpt ]]; do
        kill -0 "$first" 2>/dev/null || must_end_well "trainer=$strategy before a node was killed"
        sleep 0.1
    done
    kill -9 "$second"
    killed_at=$EPOCHREALTIME
    if wait "$first"; then
        echo "multi_node: the run ended before its second node could be killed" >&2
        exit 1
    fi
    noticed=$(python -c "print(f'{$EPOCHREALTIME - $killed_at:.1f}')")
    start_second_node
    start_both "trainer=$strategy" ckpt_path=last
    must_end_well "trainer=$strategy resumed"
    resumed=$(largest_difference "$single" "$(newest)")
    echo "| $strategy | $plain | $resumed | $noticed |"
    result+=" ${strategy}_loss_difference=$plain ${strategy}_loss_difference_resumed=$resumed ${strategy}_seconds_to_end=$noticed"
    kill -9 "$second"
    wait 2>/dev/null || true
done
echo
echo "$result"
