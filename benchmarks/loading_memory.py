#!/usr/bin/env python3
"""Measure the host memory that two processes need to load a model: each a copy, or ZeRO-3's parts.

A random model of 348 million parameters is made in a temporary directory, in bf16 like most
published ones (five files, 0.65 GiB), and loaded in fp32 (1.30 GiB), as for full fine-tuning.
Counted is what comes on top of the imports: `own` is the peak of a process's own memory (sampled),
`with files` that of all its resident pages, those of the mapped model files included, which
processes share, `kept` what is left of its own afterwards. MALLOC_MMAP_THRESHOLD_ makes the C
library give freed memory back at once; without it, it kept 0.1 to 0.7 GiB more under ZeRO-3,
another amount each time.

By hand       python benchmarks/loading_memory.py     a minute on two CPU cores, 4 GiB, no GPU
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816,
                             num_hidden_layers=22, num_attention_heads=16)  # fmt: skip
        model = LlamaForCausalLM(config)
        count = sum(p.numel() for p in model.parameters())
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="150MB")
        del model
        print(f"{count:,} parameters, {count * 4 / 2**30:.2f} GiB in fp32")
        (Path(folder) / "runs.json").write_text("[]")
        for way in ("plain", "zero3"):
            found = measure(folder, way)
            for line in found:
                text = "  ".join(f"{n} {v:.2f} GiB" for n, v in line.items() if n != "rank")
                print(f"{way}  rank {line['rank']}  {text}")
            print(f"{way}  both    own {sum(line['own'] for line in found):.2f} GiB", flush=True)


def measure(folder, way):
    """What load() finds in each of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", __file__, folder, way]  # fmt: skip
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    settings |= {"ACCELERATE_USE_DEEPSPEED": "true", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(found) != 2:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return sorted(found, key=lambda line: line["rank"])


def resident(name):
    """VmHWM (peak of all resident pages) or RssAnon (own ones, now) of this process, in GiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**20


def load(folder, way):
    """One process, like finetune_full.py: the arguments, which tell DeepSpeed, then the model."""
    sys.argv = ["many_runs.py", "none.py", f"{folder}/runs.json"]
    sys.path.insert(0, str(ROOT / "tests"))
    import many_runs  # no runs, but it makes DeepSpeed work on CPU processes

    assert not many_runs.runs
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

    config = ROOT / "deepspeed_configs" / f"{'zero3' if way == 'zero3' else 'zero2'}.json"
    # Alive while the model is loaded:
    training = TrainingArguments(output_dir=folder, deepspeed=str(config))
    deepspeed.init_distributed()
    torch.distributed.barrier()
    own, peak, loaded = [resident("RssAnon")], resident("VmRSS"), threading.Event()

    def sample():
        while not loaded.wait(0.005):
            own.append(resident("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.set()
    thread.join()
    assert isinstance(model, LlamaForCausalLM)
    figures = {
        "own": max(own) - own[0],
        "with files": resident("VmHWM") - peak,
        "kept": resident("RssAnon") - own[0],
    }
    print(json.dumps({"rank": training.process_index} | figures), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif "RANK" in os.environ:  # started by main()
        load(*sys.argv[1:])
    else:
        print(__doc__ if sys.argv[1] in ("-h", "--help") else "error: this takes no arguments.")
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
