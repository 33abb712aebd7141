#!/usr/bin/env bash
# Runs a shardlens command on one or more ranks, setting up an environment on first use.
#
#   ./launch.sh [-n RANKS] [--nnodes N --rdzv-endpoint HOST:PORT ...] COMMAND ...
#   ./launch.sh demo             generate with, read and steer the packaged model on 2 ranks
#   ./launch.sh demo smollm2     the same with a real model, which it fetches (93 MB) if need be
#   ./launch.sh model smollm2    fetch that model and print where it is
#   ./launch.sh test [ARGS]      run the tests that are not marked slow (ARGS go to pytest)
#   ./launch.sh test --slow ...  run those that are, and only them
#   ./launch.sh check            lint and type check
#
# RANKS defaults to the GPUs present, or 1. Other options before COMMAND go to
# torch.distributed.run as they are. It listens on all interfaces: only on a network that you trust.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# From the repository's root, folders such as kernels/ would hide installed packages of that name.
export PYTHONSAFEPATH=1

# The python that can run shardlens: the active one if it has it, else .venv, made if missing.
# With an argument, that module must be importable too, and the extra "dev" is what brings it.
set_up() {
    local needs=${1:-shardlens}
    python=python3
    if command -v python >/dev/null; then python=python; fi
    if "$python" -c "import shardlens.cli, $needs" 2>/dev/null; then return; fi
    python=$here/.venv/bin/python
    if "$python" -c "import shardlens.cli, $needs" 2>/dev/null; then return; fi
    echo "shardlens: setting up $here/.venv (first use)" >&2
    if [ ! -x "$python" ]; then python3 -m venv "$here/.venv"; fi
    local extra=""
    if [ "$needs" != shardlens ]; then extra="[dev]"; fi
    "$python" -m pip install --quiet --disable-pip-version-check -e "$here$extra"
}

gpus() { nvidia-smi --list-gpus 2>/dev/null | grep -c . || true; }

# run RANKS COMMAND...: one process directly, more of them under shardlens.launcher, which takes the
# place of this shell; those of several machines under torch.distributed.run.
run() {
    local ranks=$1
    shift
    if [ ${#passed[@]} != 0 ]; then
        share_cores "$ranks"
        run_across "$ranks" "$@"
    elif [ "$ranks" = 1 ]; then
        exec "$python" -m shardlens "$@"
    else
        share_cores "$ranks"
        exec "$python" -m shardlens.launcher -n "$ranks" -- "$@"
    fi
}

share_cores() {
    local cores
    cores=$(nproc 2>/dev/null || echo 1)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}

# torch.distributed.run ends with 1 whatever its ranks say: they leave bad input's code in a file.
run_across() {
    local ranks=$1 status=0
    shift
    temporary_folder
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    trap : INT  # from the terminal, it reaches torch.distributed.run, too
    SHARDLENS_EXIT_CODE_FILE=$folder/code "$python" -m torch.distributed.run \
        --nproc-per-node "$ranks" --log-dir "$folder/logs" "${passed[@]}" -m shardlens "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do  # a trap ends a wait
        status=0
        wait "$child" || status=$?
    done
    if [ -s "$folder/code" ]; then status=$(cat "$folder/code"); fi
    return "$status"
}

# Runs a command on 2 ranks and shows it as a user would type it.
show() {
    local word line="\$ ./launch.sh -n 2"
    for word in "$@"; do
        if [[ $word == *" "* ]]; then word="\"$word\""; fi
        line+=" $word"
    done
    printf '\n%s\n' "$line"
    (run 2 "$@")  # in a shell of its own, whose place it takes
}

# A folder that is removed however the script ends.
temporary_folder() {
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

demo() {
    show generate demo --prompt "Anna is cautious." --max-new-tokens 80
    show lens demo --prompt "The capital of Norvia is" --max-new-tokens 2
    show lens demo --max-new-tokens 3 --positions generated --prompt \
        "Mira puts the ring in the drawer. Hugo puts the key in the barn. Later Mira looks for the"
    temporary_folder
    local vector=$folder/cautious.safetensors
    cd "$here"
    show steer extract demo --pairs model/demo/dispositions-cautious-bold.jsonl --share 0.4 \
        --contrast "Anna is cautious." "Anna is bold." --layers 1-5 --out "$vector"
    show steer generate demo --vector "$vector" --layers 1 --scale -1 1 --max-new-tokens 16 \
        --prompt "A bear stands near the barn. Anna wants to"
    show steer eval demo --pairs model/demo/dispositions-cautious-bold.jsonl --vector "$vector"
}

demo_smollm2() {
    "$python" -m shardlens model smollm2
    show generate smollm2 --chat --prompt "What is the capital of France?" --max-new-tokens 24
    show lens smollm2 --prompt "The capital of France is" --layers 18-29
    temporary_folder
    local vector=$folder/cautious.safetensors
    cd "$here"
    show steer extract smollm2 --pairs model/demo/dispositions-cautious-bold.jsonl --share 0.1 \
        --contrast "You are cautious and afraid." "You are bold and reckless." --layers 14 --out "$vector"
    show steer generate smollm2 --vector "$vector" --layers 14 --scale -8 8 --max-new-tokens 24 \
        --prompt "Anna saw a bear near the barn, and she"
}

# Type checkers cannot see through the package-dir mapping: they are shown links laid as packages.
link_packages() {
    rm -rf "$here/.ns"
    mkdir -p "$here/.ns/shardlens"
    ln -s "$here"/shardlens/* "$here/.ns/shardlens/"
    local folder
    for folder in kernels parallel tokenizer model engine interp bench; do
        ln -s "$here/$folder" "$here/.ns/shardlens/$folder"
    done
}

# run_tests [--slow] [ARGS]: ARGS go to pytest, for which the last -m counts.
run_tests() {
    local word marker="not slow" arguments=()
    for word in "$@"; do
        if [ "$word" = --slow ]; then marker=slow; else arguments+=("$word"); fi
    done
    cd "$here"
    # a worker a core, each a file at a time: fixtures of a file are made once
    exec "$python" -m pytest -n auto --maxprocesses 8 --dist loadfile -m "$marker" \
        ${arguments[@]+"${arguments[@]}"}
}

check() {
    cd "$here"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    link_packages
    cd .ns
    "$python" -m mypy -p shardlens --config-file ../pyproject.toml
}

ranks=""
passed=()
while [ $# -gt 0 ]; do
    case $1 in
        -n) ranks=${2:?-n needs a number of ranks}; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        --*=* | --standalone) passed+=("$1"); shift ;;
        --*) passed+=("$1" "${2:?$1 needs a value}"); shift 2 ;;
        *) break ;;
    esac
done
if [ $# = 0 ]; then usage >&2; exit 2; fi
if [ -z "$ranks" ]; then ranks=$(gpus); fi
if ! [[ $ranks =~ ^[0-9]+$ ]]; then echo "launch.sh: -n $ranks is not a number" >&2; exit 2; fi
if [ "$ranks" = 0 ]; then ranks=1; fi

case $1 in
    check)
        set_up mypy
        check
        ;;
    test)
        shift
        set_up "transformers, xdist"
        run_tests "$@"
        ;;
    demo)
        set_up
        case ${2:-} in
            "") demo ;;
            smollm2) demo_smollm2 ;;
            *) echo "launch.sh: demo $2 is not known: only demo and demo smollm2 are" >&2; exit 2 ;;
        esac
        ;;
    *)
        set_up
        run "$ranks" "$@"
        ;;
esac
