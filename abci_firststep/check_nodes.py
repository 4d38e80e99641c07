#!/usr/bin/env python3
"""Check a job's nodes before an expensive run: does every rank compute and reach the others?

Each rank names its host and device, fills some memory and reads it back, and takes part in
all-reduces, whose result is checked and whose bandwidth is printed. It takes a minute, where a
broken node costs a walltime.

One node        torchrun --standalone --nproc_per_node 8 check_nodes.py
Several nodes   qsub -P GROUP job_check_nodes.sh
Bandwidths      https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import argparse
import os
import platform
import socket
import sys
import time
from datetime import timedelta

# Variables by which nodes would compute or wait otherwise than each other, as they begin.
SHARED = ("PYTORCH_", "OMP_NUM_", "BUILD_CACHE", "HF_HOME", "HF_HUB_", "HF_DATASETS_", "CUDA_")
OWN = ("CUDA_VISIBLE_DEVICES", "CUDA_CACHE_PATH", "CUDA_HOME", "CUDA_PATH")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--size_mib", type=int, default=256, help="MiB per all-reduce; small ones measure latency.")
    add("--repeat", type=int, default=20, help="All-reduces timed, after 3 that are not.")
    add("--memory_gib", type=float, default=1.0, help="GiB that each rank fills and reads back.")
    add("--ddp_timeout", type=int, default=120, help="Seconds to wait for a rank's answer.")
    args = parser.parse_args(argv)
    for name in ("size_mib", "repeat", "memory_gib", "ddp_timeout"):
        if getattr(args, name) <= 0:
            fail(f"--{name} must be above 0, not {getattr(args, name)}.")
    if "WORLD_SIZE" not in os.environ:
        fail("no launcher. Type: torchrun --standalone --nproc_per_node 2 check_nodes.py")
    return args


def fail(message, every_rank=False):
    """Print one line on stderr, leave with exit code 2; of several ranks only the first speaks."""
    if every_rank or int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks when one leaves: let the first one speak
    raise SystemExit(2)


def say(name, text):
    """One line of the report that the first rank prints."""
    if int(os.environ["RANK"]) == 0:
        print(f"{name:<11}{text}", flush=True)


def check_memory(torch, device, gib):
    """Fill `gib` GiB of the device, read them back; return (free, total) GiB before that."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        pages = os.sysconf("SC_PAGE_SIZE")
        free, total = os.sysconf("SC_AVPHYS_PAGES") * pages, os.sysconf("SC_PHYS_PAGES") * pages
    pattern = torch.arange(2**20, dtype=torch.int32, device=device)
    block = pattern.repeat(max(1, int(gib * 256)))  # 2**20 numbers of 4 bytes are 1/256 GiB
    if not bool((block.view(-1, 2**20) == pattern).all()):
        place = f"rank {os.environ['RANK']} on {socket.gethostname()}"
        fail(f"{place}: memory of {device} did not hold what was written.", every_rank=True)
    return free / 2**30, total / 2**30


def all_reduce_seconds(torch, device, mib, repeat):
    """Seconds per all-reduce of `mib` MiB of fp32 over all ranks; a wrong sum ends the check."""
    import torch.distributed as dist

    ranks, rank = dist.get_world_size(), dist.get_rank()
    data = torch.full((mib * 2**18,), float(rank + 1), device=device)
    dist.all_reduce(data)
    if not bool((data == ranks * (ranks + 1) / 2).all()):
        place = f"rank {rank} on {socket.gethostname()}"
        fail(f"{place}: an all-reduce gave a wrong sum.", every_rank=True)
    data.zero_()  # sums of zeros stay finite however often they are added
    for step in range(2 + repeat):
        if step == 2:
            wait(torch, device)
            began = time.perf_counter()
        dist.all_reduce(data)
    wait(torch, device)
    return (time.perf_counter() - began) / repeat


def wait(torch, device):
    """Until every rank has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    torch.distributed.barrier()


def choose_device(torch):
    """Return this rank's device and what to call it."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), f"CPU, {torch.get_num_threads()} thread(s)"
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        fail(f"{socket.gethostname()} has {count} GPUs for more ranks than that.", every_rank=True)
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device, torch.cuda.get_device_name(device)


def main(argv=None):
    args = parse(argv)
    began = time.perf_counter()
    import torch
    import torch.distributed as dist

    device, name = choose_device(torch)
    backend, wait_for = "nccl" if device.type == "cuda" else "gloo", args.ddp_timeout
    about = f"{os.environ['WORLD_SIZE']} ranks, {backend}"
    say("start", f"{about}; waits {wait_for} s for one that does not come")
    dist.init_process_group(backend, timeout=timedelta(seconds=wait_for))

    free, total = check_memory(torch, device, args.memory_gib)
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    versions += f", CUDA {torch.version.cuda}"
    found = os.environ.items()
    variables = {n: value for n, value in found if n.startswith(SHARED) and n not in OWN}
    mine = (socket.gethostname(), name, free, total, versions, variables)
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    for rank, (host, name, free, total, *_) in enumerate(ranks):
        memory = f"memory {free:.1f} GiB free of {total:.1f}, {args.memory_gib:g} checked"
        say(f"rank {rank}", f"{host}  {name}  {memory}")
    hosts = sorted({host for host, *_ in ranks})
    say("hosts", f"{len(hosts)}: {', '.join(hosts)}; {versions}")
    for host, *_, other, theirs in ranks:
        if other != versions:
            fail(f"{host} has {other}, {mine[0]} {versions}: nodes must use the same environment.")
        for key in sorted(variables.keys() | theirs.keys()):
            here, there = variables.get(key, "not set"), theirs.get(key, "not set")
            if here != there:
                fail(f"{key} is {there} on {host}, {here} on {mine[0]}: it must be equal.")

    seconds = all_reduce_seconds(torch, device, args.size_mib, args.repeat)
    count, rate = len(ranks), args.size_mib * 2**20 / seconds / 1e9
    bus = f"bus bandwidth {2 * (count - 1) / count * rate:.2f} GB/s"
    figures = f"{args.size_mib} MiB in {seconds * 1e3:.1f} ms, {rate:.2f} GB/s; {bus}"
    say("all-reduce", f"{figures}; sums correct on every rank")
    say("done", f"all {count} ranks answered, {time.perf_counter() - began:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
