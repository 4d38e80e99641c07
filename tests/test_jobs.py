"""Job files and jobs/*.sh under an imitation of PBS Professional, and within ABCI 3.0's limits.

A stub stands for the virtual environment's Python wherever the shell is the point: it writes down
how it was called.
"""

import functools
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
JOBS = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/job*.sh"))
TRAINING_JOBS = [job for job in JOBS if job.parent.name.startswith("finetune_")]
SCRIPTS = sorted({*ROOT.glob("*/*.sh"), *ROOT.glob("*.sh")})
# Queue: most nodes per job; walltime: 168 h at most.
LIMITS = {"rt_HF": 128, "rt_HG": 1, "rt_HC": 1}
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"

# Answers what env.sh and the job files ask Python, and draws in earnest where there are $LOSSES.
# Everything else it writes to $RECORD as JSON; it leaves $LOSSES in $WRITES, as a training would,
# prints $SAYS as an error, and ends with $STATUS.
STUB = f"""#!/bin/bash
case "$*" in
  *platform*) echo 3.12.9; exit ;;
  *device_count*) echo "${{GPUS_SEEN:-0}}"; exit ;;
  ../jobs/run_ranks.py*) exec {sys.executable} "$@" ;;
  ../jobs/warn_job.py*) [[ -n "${{WARNS:-}}" ]] && exec {sys.executable} "$@"; exit ;;
  ../jobs/draw_loss.py*) [[ -n "${{LOSSES:-}}" ]] && exec {sys.executable} "$@"; exit ;;
esac
[[ -z "${{SAYS:-}}" ]] || echo "$SAYS" >&2
if [[ -n "${{WRITES:-}}" ]]; then
  mkdir -p "$WRITES" && echo "$LOSSES" >"$WRITES/trainer_state.json"
fi
exec {sys.executable} -c '
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    keep = ("OMP_NUM_THREADS", "HF_HOME", "TRITON_CACHE_DIR", "PYTHONUNBUFFERED")
    call = [sys.argv[1:], os.getcwd(), os.umask(0), {{k: os.environ.get(k) for k in keep}}]
    print(json.dumps(call), file=record)
print("stdout of", sys.argv[2])
sys.exit(int(os.environ.get("STATUS", "0")))' "$(basename "$0")" "$@"
"""


def write_executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_venv(folder):
    for name in ("python", "torchrun", "mpirun"):
        write_executable(folder / "bin" / name, STUB)
    (folder / "bin" / "activate").write_text(
        f"export PATH={shlex.quote(str(folder / 'bin'))}:$PATH\n"
    )


@pytest.fixture
def machine(tmp_path):
    """A copy of the lessons beside a stub environment, in a directory with a space in its name, and
    a home."""
    project = tmp_path / "my work"
    for path in [*JOBS, *(script.relative_to(ROOT) for script in ROOT.glob("*/*.py"))]:
        if path.parts[0] != "tests":
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, project / path)
    shutil.copytree(
        ROOT / "jobs",
        project / "jobs",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    make_venv(project / ".venv")
    (tmp_path / "home").mkdir()
    (tmp_path / "spool").mkdir()
    return tmp_path


def environment(machine, **more):
    """What a program finds on a plain machine: nothing but the basics."""
    basic = {
        "HOME": str(machine / "home"),
        "USER": "u",
        "LOGNAME": "u",
        "SHELL": "/bin/bash",
        "PATH": SYSTEM_PATH,
    }
    return basic | {"RECORD": str(machine / "record"), "BUILD_CACHE": str(machine / "build")} | more


def run_as_pbs(machine, job, workdir=None, queue="rt_HF", **more):
    """Run a job file as PBS does: a renamed private copy, started in $HOME, with exactly PBS's
    variables."""
    workdir = workdir or machine / "my work" / job.parent
    spooled = machine / "spool" / "12.hnode001.SC"
    shutil.copy(ROOT / job, spooled)
    spooled.chmod(0o700)
    (machine / "nodes").write_text("hnode001\n")
    (machine / "tmp").mkdir(exist_ok=True)
    home = str(machine / "home")
    pbs = {
        "ENVIRONMENT": "BATCH", "PBS_ENVIRONMENT": "PBS_BATCH", "NCPUS": "192",
        "OMP_NUM_THREADS": "192", "TMPDIR": str(machine / "tmp"), "PBS_JOBID": "12.hnode001",
        "PBS_JOBNAME": job.parent.name, "PBS_QUEUE": queue, "PBS_JOBDIR": home,
        "PBS_NODEFILE": str(machine / "nodes"), "PBS_NODENUM": "0", "PBS_TASKNUM": "1",
        "PBS_MOMPORT": "15003", "PBS_JOBCOOKIE": "0F", "PBS_O_WORKDIR": str(workdir),
        "PBS_O_HOST": "login1", "PBS_O_QUEUE": queue, "PBS_O_SYSTEM": "Linux", "PBS_O_HOME": home,
        "PBS_O_LOGNAME": "u", "PBS_O_SHELL": "/bin/bash", "PBS_O_PATH": SYSTEM_PATH, "MANPATH": "",
    }  # fmt: skip
    env = environment(machine, **pbs) | more
    env.pop("BUILD_CACHE")
    return subprocess.run(
        [str(spooled)], cwd=machine / "home", env=env, umask=0o077, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip


def calls(machine):
    """[(argv, directory, umask, environment)] of the stub's calls; argv[0]: python or torchrun."""
    record = machine / "record"
    lines = record.read_text().splitlines() if record.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def last_words(machine):
    return calls(machine)[-1][0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_reads_it(script):
    assert b"\r" not in script.read_bytes()
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_directives_are_what_pbs_and_abci_accept(job):
    lines = (ROOT / job).read_text(encoding="ascii").splitlines()
    assert lines[0] == "#!/bin/bash"
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#PBS") for line in lines[first_command:]), (
        "PBS reads none behind a command"
    )
    directives = [line for line in lines[:first_command] if re.match(r"#\s*PBS", line)]
    options = []
    for line in directives:
        # One option each; and nothing behind it: PBS refuses a trailing comment.
        match = re.fullmatch(r"#PBS -([A-Za-z]) (\S+)", line)
        assert match, line
        options.append((match[1], match[2]))
    plain = dict(options)
    # No -o: into a missing directory it holds the job for ever. No -P, -p, -v: they are the user's.
    assert sorted(name for name, _ in options) == sorted("Nqlljk")
    resources = dict(value.split("=", 1) for name, value in options if name == "l")
    assert re.fullmatch(r"[!-.0-~]{1,230}", plain["N"])
    assert (plain["j"], plain["k"]) == ("oe", "oed")
    nodes = int(resources["select"].split(":")[0])
    assert 1 <= nodes <= LIMITS[plain["q"]]
    hours, minutes, seconds = (
        int(part) for part in re.fullmatch(r"(\d+):(\d\d):(\d\d)", resources["walltime"]).groups()
    )
    assert 0 < hours * 3600 + minutes * 60 + seconds <= 168 * 3600
    assert len(lines) <= (46 if job.parent.name in ("finetune_dpo", "finetune_grpo") else 44)


def test_checker_of_directives_can_fail(tmp_path, monkeypatch):
    """The test above must notice each of the mistakes that PBS or a user would suffer from."""
    good = (ROOT / "abci_firststep/job.sh").read_text()
    bad = {
        "comment behind": good.replace("#PBS -q rt_HG", "#PBS -q rt_HG # the queue"),
        "log into a directory": good.replace("#PBS -k oed", "#PBS -k oed\n#PBS -o logs/"),
        "two GPUs nodes": good.replace("select=1", "select=2"),
        "days": good.replace("0:10:00", "1-00:00:00"),
        "too long": good.replace("0:10:00", "169:00:00"),
        "unknown queue": good.replace("rt_HG", "rt_F"),
        "behind a command": good.replace("source ", "#PBS -r n\nsource "),
        "late log": good.replace("#PBS -k oed\n", ""),
    }
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, text in bad.items():
        assert text != good, name
        (tmp_path / "job.sh").write_text(text)
        with pytest.raises((AssertionError, KeyError, AttributeError, ValueError)):
            test_directives_are_what_pbs_and_abci_accept(Path("job.sh"))
    (tmp_path / "job.sh").write_text(good)
    test_directives_are_what_pbs_and_abci_accept(Path("job.sh"))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_job_under_pbs(machine, job):
    """Right directory, readable for the group, sensible threads, one line on the environment, the
    program's status."""
    done = run_as_pbs(machine, job)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0].startswith("env "), done.stdout
    assert "error" not in done.stdout
    lesson = str(machine / "my work" / job.parent)
    for _, directory, umask, env in calls(machine):
        assert (directory, oct(umask)) == (lesson, "0o27")
        assert int(env["OMP_NUM_THREADS"]) <= min(16, os.cpu_count())
        assert env["HF_HOME"] == str(machine / "home/.cache/huggingface")
        assert env["TRITON_CACHE_DIR"].startswith(str(machine / "tmp"))
        assert env["PYTHONUNBUFFERED"] == "1"
    assert calls(machine)
    if job not in TRAINING_JOBS:  # their statuses are below
        assert run_as_pbs(machine, job, STATUS="7").returncode == 7


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_args_are_words_and_nothing_more(machine, job):
    """ARGS is split at blanks and newlines; no expansion, no execution, quotes are letters."""
    value = '--one * $(touch x)\n--two  `touch x` "a b" $HOME ~ \\n --three=1,2'
    words = [
        "--one",
        "*",
        "$(touch",
        "x)",
        "--two",
        "`touch",
        "x`",
        '"a',
        'b"',
        "$HOME",
        "~",
        "\\n",
        "--three=1,2",
    ]
    assert run_as_pbs(machine, job, ARGS=value).returncode == 0
    assert any(argv[-len(words) :] == words for argv, *_ in calls(machine))
    assert not list(machine.rglob("x"))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_job_by_hand(machine, job):
    """From any directory, with arguments behind the file name that keep their blanks; also inside
    qsub -I."""
    path = machine / "my work" / job
    for more in ({}, {"PBS_ENVIRONMENT": "PBS_INTERACTIVE", "PBS_O_WORKDIR": "/"}):
        command = ["bash", str(path), "--extra", "two words"]
        env = environment(machine, ARGS="--from_args 1", **more)
        done = subprocess.run(
            command, cwd=machine, env=env, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        wanted = ["--from_args", "1", "--extra", "two words"]
        assert any(
            argv[-4:] == wanted and directory == str(path.parent)
            for argv, directory, *_ in calls(machine)
        )
        (machine / "record").unlink()


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_submitted_from_elsewhere(machine, job):
    """From home, and from another lesson's directory: a line that says where to submit, and nothing
    started."""
    other = next(path.parent for path in JOBS if path.parent != job.parent)
    for workdir in (machine / "home", machine / "my work" / other):
        done = run_as_pbs(machine, job, workdir=workdir)
        assert done.returncode == 2
        assert done.stdout.count("\n") == 1
        assert done.stdout.startswith("error: no ")
        assert "Submit from" in done.stdout
        assert str(workdir) in done.stdout
    assert not calls(machine)


def test_finetune_variables(machine):
    job = Path("finetune_full/job.sh")
    run = functools.partial(run_as_pbs, machine, job)
    assert run().returncode == 0
    words = last_words(machine)
    assert words[:4] == [
        "python",
        "finetune_full.py",
        "--model_name_or_path",
        "../tiny_model/output/llama",
    ]
    assert words[words.index("--validation_file") + 1] == "../jglue/output/jsquad_validation.jsonl"
    assert words[words.index("--learning_rate") + 1] == "3e-3"
    assert {"--save_steps", "--save_total_limit"} <= set(words)

    # A model and a file of one's own: no rate for small new models, no foreign validation file.
    assert run(MODEL="/m/my model", TRAIN_FILE="a b.jsonl", OUTPUT_DIR="output/x y").returncode == 0
    words = last_words(machine)
    assert {"/m/my model", "a b.jsonl", "output/x y"} < set(words)
    assert not {"--learning_rate", "--validation_file", "--deepspeed"} & set(words)
    # The same where ARGS or the line of a sweep names them.
    assert run(ARGS="--model_name_or_path ../a --train_file b.jsonl").returncode == 0
    assert not {"--learning_rate", "--validation_file"} & set(last_words(machine))
    assert run(VALIDATION_FILE="").returncode == 0
    assert "--validation_file" not in last_words(machine)

    assert run(GPUS_SEEN="1").returncode == 0
    assert last_words(machine)[0] == "python"
    assert run(GPUS_SEEN="8").returncode == 0
    assert last_words(machine)[:5] == [
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        "8",
        "finetune_full.py",
    ]
    assert run(GPUS_SEEN="1", DEEPSPEED="../deepspeed_configs/zero3.json").returncode == 0
    words = last_words(machine)
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node", "1"]
    assert words[words.index("--deepspeed") + 1] == "../deepspeed_configs/zero3.json"

    before = len(calls(machine))
    done = run(DEEPSPEED="../deepspeed_configs/zero3.json")
    assert (done.returncode, done.stdout.splitlines()[-1].split(".")[0]) == (
        2,
        "error: DEEPSPEED needs a GPU, here is none",
    )
    assert len(calls(machine)) == before
    done = run(GPUS_SEEN="8", STATUS="3")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "failed     status 3: see above"

    # A settings file stands for the variables, and for the small model's rate and files.
    done = run(CONFIG="my run.yaml")
    assert (done.returncode, done.stdout.count("my run.yaml")) == (0, 0)  # it is not there
    assert last_words(machine) == ["python", "finetune_full.py", "my run.yaml"]
    assert (
        run(CONFIG="my.yaml", GPUS_SEEN="1").returncode == 0
    )  # the file may name a DeepSpeed configuration
    assert last_words(machine)[0] == "torchrun"


@pytest.mark.parametrize("job", TRAINING_JOBS, ids=str)
def test_a_training_with_gpus_is_estimated_beside_it(machine, job):
    """With the words of the training; its status stays that of the training."""
    warn = '../jobs/warn_job.py "$GPUS" ' + f"{job.parent}.py"
    assert warn in (ROOT / job).read_text(encoding="ascii")
    write_executable(machine / "my work/jobs/warn_job.py", "import sys; print('WARNED', sys.argv)")
    more = {"MODEL": "/m", "ARGS": "--max_length 9"}
    done = run_as_pbs(machine, job, GPUS_SEEN="2", WARNS="1", STATUS="3", **more)
    assert done.returncode == 3
    said = next(line for line in done.stdout.splitlines() if line.startswith("WARNED"))
    assert f"'2', '{job.parent}.py'" in said and "'--max_length', '9']" in said
    done = run_as_pbs(machine, job, WARNS="1")
    assert (done.returncode, "WARNED" in done.stdout) == (0, False)  # of no use without a GPU


@pytest.mark.parametrize("lesson", ["finetune_full", "finetune_lora"])
def test_multinode_job(machine, lesson):
    """mpirun is told the nodes, the placement and each variable the others need; DeepSpeed where
    there are GPUs."""
    run = functools.partial(run_as_pbs, machine, Path(lesson, "job_multinode.sh"))
    more = {"NCCL_DEBUG": "WARN", "HF_DATASETS_OFFLINE": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    more |= {"GROUP": "g", "CACHE_ROOT": str(machine / "c"), "CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert run(GPUS_SEEN="8", **more).returncode == 0
    words = last_words(machine)
    start = shlex.split("mpirun -np 1 -map-by ppr:1:node -bind-to none -hostfile")
    assert words[: len(start) + 1] == [*start, str(machine / "nodes")]
    passed = {words[i + 1] for i, word in enumerate(words) if word == "-x"}
    wanted = {
        "NODES",
        "MASTER_ADDR",
        "MASTER_PORT",
        "VENV",
        "GROUP",
        "CACHE_ROOT",
        "HF_HOME",
        "PBS_JOBID",
        "DEADLINE",
        "DEADLINE_OF",
        "RUN_RANKS",
        "PYTORCH_ALLOC_CONF",
        "OMP_NUM_THREADS",
        "BUILD_CACHE",
    }
    assert wanted | {name for name in more if name != "CUDA_VISIBLE_DEVICES"} <= passed
    assert "CUDA_VISIBLE_DEVICES" not in passed, "the first node's GPUs are not another's"
    script = words.index("../jobs/node.sh")
    assert words[script - 1 : script + 2] == ["bash", "../jobs/node.sh", f"{lesson}.py"]
    stage = {"finetune_full": 3, "finetune_lora": 2}[lesson]
    assert words[words.index("--deepspeed") + 1] == f"../deepspeed_configs/zero{stage}.json"
    assert run(GPUS_SEEN="8", DEEPSPEED="").returncode == 0
    assert "--deepspeed" not in last_words(machine)
    done = run(DEEPSPEED="../deepspeed_configs/zero3.json")
    assert (done.returncode, done.stdout.count("error: DEEPSPEED needs a GPU")) == (2, 1)
    assert "gloo" in run().stdout
    done = run(HOSTFILE="/nowhere")
    assert (
        done.returncode,
        done.stdout.count("error: HOSTFILE=/nowhere is not there or empty"),
    ) == (2, 1)
    (machine / "my work/.venv/bin/mpirun").unlink()
    if not shutil.which("mpirun", path=SYSTEM_PATH):
        done = run()
        assert (done.returncode, done.stdout.count("error: no mpirun here. Set MPI_MODULE")) == (
            2,
            1,
        )


HISTORY = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 2}]
LOSSES = json.dumps({"log_history": HISTORY})


@pytest.mark.parametrize("job", TRAINING_JOBS, ids=str)
def test_only_a_training_that_went_well_is_drawn(machine, job):
    """The status is the training's, and a picture that fails changes nothing in it."""
    output = machine / "my work" / job.parent / "output/my"
    (machine / "broken").mkdir()
    (machine / "broken/matplotlib.py").write_text("raise ImportError('No module matplotlib')")
    more = {"OUTPUT_DIR": "output/my", "LOSSES": LOSSES, "WRITES": str(output)}
    more |= {"PYTHONPATH": str(machine / "broken")}
    last = "error: matplotlib does not load (No module matplotlib). Type: pip install matplotlib"
    for status in (2, 75, 0):
        done = run_as_pbs(machine, job, STATUS=str(status), **more)
        assert done.returncode == status
        assert ("matplotlib" in done.stdout) == done.stdout.endswith(last + "\n") == (status == 0)
    assert [path.name for path in output.iterdir()] == ["trainer_state.json"]


def test_picture_of_this_job_or_none(machine):
    """Drawn from what the training wrote; no losses, an older run's, elsewhere: a line says so."""
    lesson = machine / "my work/finetune_full"
    output, picture = lesson / "output", lesson / "output/loss.png"
    run = functools.partial(run_as_pbs, machine, Path("finetune_full/job.sh"), LOSSES=LOSSES)
    done = run(WRITES=str(output), LOSSES='{"log_history": []}')
    last = "error: output/trainer_state.json holds no loss. Train with a smaller --logging_steps."
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, last)

    (output / "trainer_state.json").write_text(LOSSES)
    os.utime(output / "trainer_state.json", (time.time() - 60,) * 2)
    elsewhere = {"ARGS": "--output_dir elsewhere", "WRITES": str(lesson / "elsewhere")}
    for more in ({}, elsewhere):
        done = run(**more)
        assert (done.returncode, picture.exists()) == (0, False)
        last = "picture    none: this job wrote no output/trainer_state.json."
        assert done.stdout.splitlines()[-1].startswith(last)

    name = "a$\\x$b 100%_ 日本 *"
    (lesson / "my.yaml").write_text(f"seed: 1\noutput_dir: output/{name}\n", encoding="utf-8")
    done = run(CONFIG="my.yaml", WRITES=str(output / name))
    last = f"picture    output/{name}/loss.png: training and validation loss"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, last)
    assert "Warning" not in done.stdout
    assert (output / name / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_jobs_end_alike():
    """What is behind the line that launches Python is the same everywhere."""
    ends = {(ROOT / job).read_text().split('"${WORDS[@]}" "$@"\n')[-1] for job in TRAINING_JOBS}
    assert len(ends) == 1
    assert len(ends.pop().splitlines()) == 3


def test_nodes_of_a_job(machine):
    """Each node counts once, in the order of the file, however many slots it has; ports differ from
    job to job."""
    (machine / "hosts").write_text("h2 slots=8\nh1\n\nh1\nh2\n")
    run = functools.partial(
        run_as_pbs, machine, Path("finetune_full/job_multinode.sh"), HOSTFILE=str(machine / "hosts")
    )
    script = ROOT / "jobs" / "multinode.sh"
    show = f'source {script}; echo "$NODES $MASTER_ADDR $MASTER_PORT"'
    for job_id, port in (("12.pbs1", 10012), ("123[4].pbs1", 10123), ("45678.pbs2", 15678)):
        env = environment(machine, HOSTFILE=str(machine / "hosts"), PBS_JOBID=job_id)
        env["PATH"] = f"{machine / 'my work/.venv/bin'}:{SYSTEM_PATH}"
        done = subprocess.run(["bash", "-c", show], env=env, capture_output=True, text=True)
        assert done.stdout == f"2 h2 {port}\n"
    assert run().returncode == 0
    assert last_words(machine)[2] == "2"


def test_other_jobs_variables(machine):
    generate, jglue, tiny = (
        Path(name) / "job.sh" for name in ("generate_text", "jglue", "tiny_model")
    )
    assert (
        run_as_pbs(machine, generate, MODEL="m", PROMPT_FILE="p q", OUTPUT_FILE="o").returncode == 0
    )
    assert last_words(machine)[:8] == shlex.split(
        "python generate_text.py --model_name_or_path m --prompt_file 'p q' --output_file o"
    )
    (machine / "record").unlink()
    assert (
        run_as_pbs(
            machine, jglue, TASK="jnli", JGLUE_DIR="/j g", MODEL="../a/m", OUTPUT_DIR="d"
        ).returncode
        == 0
    )
    prepare, score = (argv for argv, *_ in calls(machine))
    assert prepare == shlex.split(
        "python prepare_jglue.py --jglue_dir '/j g' --output_dir d --task jnli"
    )
    assert score == shlex.split(
        "python evaluate_jglue.py --model_name_or_path ../a/m --task jnli --data_dir d"
    )
    (machine / "record").unlink()
    done = run_as_pbs(machine, jglue, TASK="jsts", MODEL="m", OUTPUT_FILE="o f", ARGS="--seed 1")
    assert done.returncode == 0
    _, answer, score = (argv for argv, *_ in calls(machine))
    assert answer == shlex.split(
        "python ../generate_text/generate_text.py --model_name_or_path m --prompt_file "
        "output/jsts_validation.jsonl --output_file 'o f' --max_new_tokens 32 --seed 1"
    )
    assert score == shlex.split("python evaluate_jglue.py --task jsts --prediction_file 'o f'")
    (machine / "record").unlink()
    assert run_as_pbs(machine, jglue, STATUS="5").returncode == 5
    assert len(calls(machine)) == 1, "a failed step must end the job"

    # The small model's text: the sample is prepared only where the prepared file is not there yet.
    (machine / "record").unlink()
    prepared = machine / "my work/jglue/output/jsquad_train.jsonl"
    for names in (["../jglue/prepare_jglue.py", "make_tiny_model.py"], ["make_tiny_model.py"]):
        assert run_as_pbs(machine, tiny, MODEL_TYPE="mpt").returncode == 0
        assert [argv[1] for argv, *_ in calls(machine)] == names
        assert {"mpt", "output/mpt"} < set(last_words(machine))
        (machine / "record").unlink()
        prepared.parent.mkdir(exist_ok=True)
        prepared.write_text("{}\n")


def source_env(machine, before="", options="set -euo pipefail", after="env", **more):
    """Source env.sh in a lesson's directory and print the environment behind a marker line."""
    script = f"{options}\n{before}\nsource ../jobs/env.sh || exit\necho ===\n{after}"
    env = environment(machine, **more)
    lesson = machine / "my work/finetune_full"
    return subprocess.run(
        ["bash", "-c", script], cwd=lesson, env=env, capture_output=True, text=True, timeout=60
    )


def variables(done):
    assert done.returncode == 0, done.stderr
    said, listing = done.stdout.split("===\n", 1)
    assert said.count("\n") == 1
    assert said.startswith("env ")
    return dict(line.split("=", 1) for line in listing.splitlines() if "=" in line)


def assert_error(done, *parts):
    """One line on stderr with all parts, status 2, nothing after it."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "===" not in done.stdout
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize("options", ["set +e", "set -euo pipefail"])
def test_env_for_strict_and_plain_callers(machine, options):
    found = variables(source_env(machine, options=options))
    root = str(machine / "home/.cache")
    assert (found["CACHE_ROOT"], found["HF_HOME"]) == (root, f"{root}/huggingface")
    assert (found["HF_XET_CACHE"], found["PIP_CACHE_DIR"]) == (
        f"{root}/huggingface/xet",
        f"{root}/pip",
    )
    assert found["TORCH_HOME"] == f"{root}/torch"
    for name in (
        "TORCH_EXTENSIONS_DIR",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "CUDA_CACHE_PATH",
    ):
        assert found[name].startswith(str(machine / "build"))
        assert Path(found[name]).is_dir()
        assert not list(Path(found[name]).iterdir()), "the write test leaves nothing"
    after = source_env(machine, options=options, after="echo $-; umask")
    assert ("e" in after.stdout.split("===\n")[1].split()[0]) == options.startswith("set -")
    assert after.stdout.split()[-1] == "0027"


def test_env_places(machine):
    """Overrides win; build caches go to the node's own disk; a login token stays with its owner."""
    local = machine / "local"
    given = {
        "PBS_LOCALDIR": local,
        "TMPDIR": "/tmp",
        "CACHE_ROOT": machine / "elsewhere",
        "PIP_CACHE_DIR": machine / "pip",
    }
    given = {name: str(place) for name, place in given.items()}
    found = variables(source_env(machine, before="unset BUILD_CACHE", **given))
    assert found["BUILD_CACHE"].startswith(f"{local}/")
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # the latter is the old name
        own = variables(source_env(machine, before="unset BUILD_CACHE", **given, **{name: "a:b"}))
        assert own[name] == "a:b" and own.get("PYTORCH_ALLOC_CONF", "a:b") == "a:b"
    assert found["HF_HOME"] == str(machine / "elsewhere/huggingface")
    assert found["PIP_CACHE_DIR"] == str(machine / "pip")
    assert found["HF_TOKEN_PATH"] == str(machine / "home/.cache/huggingface/token")


def test_env_group_area(machine):
    """Where the path shows a group area, or GROUP names one, the caches go there: nothing is made
    on this machine."""
    for before, more in (("PWD=/groups/gaa50000/me/work", {}), ("", {"GROUP": "gaa50000"})):
        done = source_env(machine, before=f"mkdir() {{ return 1; }}\n{before}", **more)
        assert_error(done, "CACHE_ROOT=/groups/gaa50000/u/cache", "Set CACHE_ROOT")
    assert not Path("/groups/gaa50000").exists()


def test_env_threads(machine):
    cpus = len(os.sched_getaffinity(0))
    pbs = {"PBS_ENVIRONMENT": "PBS_BATCH", "OMP_NUM_THREADS": "192"}
    assert int(variables(source_env(machine, NCPUS="192", **pbs))["OMP_NUM_THREADS"]) == min(
        16, cpus
    )
    assert variables(source_env(machine, NCPUS="1", **pbs))["OMP_NUM_THREADS"] == "1"
    many = """nproc() { echo 192; }
export -f nproc
env() { if [[ $* == *nproc ]]; then echo 192; else command env; fi; }"""
    assert (
        variables(source_env(machine, before=many, NCPUS="192", **pbs))["OMP_NUM_THREADS"] == "16"
    )
    assert variables(source_env(machine, OMP_NUM_THREADS="3"))["OMP_NUM_THREADS"] == "3"


MODULES = """
module() {
  echo "module $*" >>"$MODULE_LOG"
  case "$*" in
    "load python/3.12/3.12.9")
      export PATH=$PATH LD_LIBRARY_PATH=/python/lib LOADED_PYTHON=$UNSET_VARIABLE ;;
    "load cuda/13.0/13.0.1") export CUDA_HOME=/cuda LD_LIBRARY_PATH=/cuda/lib:$LD_LIBRARY_PATH ;;
    "load "*) echo "ERROR: Unable to locate a modulefile for '$2'" >&2; false ;;
    "-t avail "*)
      printf '%s\\n' /apps: python/3.13/3.13.2 python/3.14/3.14.4 cuda/13.2/13.2.1 >&2 ;;
  esac
}
export -f module
"""


def test_env_modules(machine):
    log = {"MODULE_LOG": str(machine / "module.log")}
    done = source_env(machine, before=MODULES, **log)
    found = variables(done)
    # nvcc from the module; the CUDA libraries from torch's wheel.
    assert (found["CUDA_HOME"], found["LD_LIBRARY_PATH"]) == ("/cuda", "/python/lib")
    assert "modules python/3.12/3.12.9 cuda/13.0/13.0.1" in done.stdout
    done = source_env(machine, before=MODULES, PYTHON_MODULE="python/3.11/3.11.1", **log)
    assert_error(
        done,
        "python/3.11/3.11.1",
        "Set PYTHON_MODULE",
        "python/3.13/3.13.2 python/3.14/3.14.4",
        "Unable",
    )
    done = source_env(machine, before=MODULES, CUDA_MODULE="cuda/1.0/1.0", **log)
    assert_error(done, "cuda/1.0/1.0", "Set CUDA_MODULE", "cuda/13.2/13.2.1")
    (machine / "module.log").unlink()
    assert "CUDA_HOME" not in variables(
        source_env(machine, before=MODULES, PYTHON_MODULE="", CUDA_MODULE="", **log)
    )
    assert "load" not in (machine / "module.log").read_text()


def test_env_says_what_it_cannot_do(machine):
    (machine / "file").write_text("")
    for name in ("CACHE_ROOT", "BUILD_CACHE", "HF_HOME"):
        place = str(machine / "file" / "x")
        assert_error(
            source_env(machine, **{name: place}), f"cannot write to {name}={place}", f"Set {name}"
        )
    assert_error(
        source_env(machine, VENV="/no/such"), "no virtual environment at /no/such", "setup_venv.sh"
    )
    write_executable(
        machine / "my work/.venv/bin/python",
        "#!/bin/bash\necho 'libpython3.12.so.1.0: not found' >&2; exit 127\n",
    )
    assert_error(
        source_env(machine), "does not start (libpython3.12.so.1.0: not found)", "PYTHON_MODULE"
    )
    # A caller that does not look at the result is stopped by its own set -e.
    command = ["bash", "-c", "set -e; source jobs/env.sh; echo ==="]
    env = environment(machine, VENV="/no/such")
    done = subprocess.run(command, cwd=machine / "my work", env=env, capture_output=True, text=True)
    assert_error(done, "no virtual environment")
    done = subprocess.run(
        ["bash", "jobs/env.sh"], cwd=machine / "my work", capture_output=True, text=True
    )
    assert_error(done, "sourced, not run")


def test_what_is_printed_can_be_typed(machine):
    """With a blank in a directory's name; what lies beside it stays."""
    beside = machine / "my" / "file"
    beside.parent.mkdir()
    beside.touch()
    venv = machine / "my work" / ".venv"
    write_executable(venv / "bin/python", "#!/bin/bash\nexit 127\n")
    for done in (source_env(machine), setup_venv(machine)):
        assert_error(done, "does not start")
        command = done.stderr[done.stderr.index("rm -r ") :].partition(" && ")[0]
        assert shlex.split(command) == ["rm", "-r", str(venv)], command


def test_a_moved_environment_is_refused(machine):
    """It would put the Python of its old place in front."""
    venv = machine / "my work" / ".venv"
    activate = venv / "bin/activate"
    for place, is_good in ((venv, True), (machine / "old" / ".venv", False)):
        activate.write_text(f"VIRTUAL_ENV={shlex.quote(str(place))}\nexport VIRTUAL_ENV\n")
        done = source_env(machine)
        if is_good:
            variables(done)
        else:
            assert_error(done, f"was made as {place}, and does not work elsewhere", "rm -r ")
            assert_error(setup_venv(machine), f"was made as {place}, and does not work elsewhere")


def test_env_in_odd_shells(machine):
    """noclobber, a cd that lists, a ~ that the shell left, an 8-bit locale, a relative VENV."""
    before = 'set -o noclobber\ncd() { builtin cd "$@" && ls; }\nexport CDPATH=/tmp'
    more = {"CACHE_ROOT": "~/kept", "HF_HOME": "~/hub", "LANG": "en_US.ISO-8859-1"}
    done = source_env(machine, before=before, VENV="../.venv", **more)
    found = variables(done)
    home = machine / "home"
    assert (found["CACHE_ROOT"], found["HF_HOME"]) == (str(home / "kept"), str(home / "hub"))
    assert found["PYTHONUTF8"] == "1" and (home / "kept").is_dir()
    assert not [*machine.rglob("~")]
    assert f"({machine / 'my work/finetune_full/../.venv'})" in done.stdout


def test_models_of_others(machine):
    """A hub cache to be read only is one where nothing is to be fetched."""
    hub = machine / "shared"
    hub.mkdir()
    before = f'mktemp() {{ [[ $1 != {shlex.quote(str(hub))}/* ]] && command mktemp "$@"; }}'
    more = {"before": before, "HF_HOME": str(hub)}
    assert_error(source_env(machine, **more), f"cannot write to HF_HOME={hub}")
    found = variables(source_env(machine, HF_HUB_OFFLINE="1", **more))
    kept = machine / "home/.cache"
    wanted = [str(hub), *(str(kept / name) for name in ("datasets", "modules", "xet"))]
    names = ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE")
    assert [found[name] for name in names] == wanted
    assert "HF_DATASETS_CACHE" not in variables(source_env(machine, HF_HUB_OFFLINE="1"))
    missing = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(machine / "file" / "x")}
    (machine / "file").touch()
    assert_error(source_env(machine, **missing), "cannot write to HF_HOME=")


def test_a_settings_file_and_its_variables(machine):
    """One of them would be lost."""
    config = {"CONFIG": "output/run_args.yaml"}
    variables(source_env(machine, **config))
    for name in ("MODEL", "TRAIN_FILE", "OUTPUT_DIR"):
        message = f"CONFIG=output/run_args.yaml stands in place of {name}=x. Leave one of them out"
        assert_error(source_env(machine, **config, **{name: "x"}), message)
    sweep = machine / "my work/finetune_full/sweep.txt"
    more = {"PBS_ARRAY_INDEX": "1", "ARGS_FILE": "sweep.txt"}
    assert_error(source_env(machine, **more), "ARGS_FILE=sweep.txt is no file, seen from")
    sweep.write_text("--output_dir a\n")
    again = "source ../jobs/env.sh || exit"  # as in a container
    done = source_env(machine, after=f"{again}\nenv", **more, **config)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_env_refuses_a_build_cache_of_somebody_else(machine):
    (machine / "build").mkdir()
    os.chown(machine / "build", 12345, 12345)
    assert_error(source_env(machine), "is not yours")


def setup_venv(machine, **more):
    return subprocess.run(
        ["bash", str(machine / "my work/jobs/setup_venv.sh")],
        cwd=machine,
        env=environment(machine, **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_setup_venv_errors(machine):
    write_executable(
        machine / "old/python3", "#!/bin/bash\n[[ $2 == *exit* ]] && exit 1\necho 3.9\n"
    )
    new = str(machine / "new_venv")
    assert_error(setup_venv(machine, VENV=new, PYTHON="/no/python"), "no /no/python", "Set PYTHON")
    assert_error(
        setup_venv(machine, VENV=new, PYTHON=str(machine / "old/python3")), "is Python 3.9", "3.11"
    )
    broken = """#!/bin/bash
[[ $1 != -m ]] && { echo 3.12; exit; }
mkdir $3
echo 'ensurepip is not available' >&2
exit 1
"""
    write_executable(machine / "broken/python3", broken)
    done = setup_venv(machine, VENV=new, PYTHON=str(machine / "broken/python3"))
    assert_error(done, "ensurepip is not available", "apt install python3-venv")
    assert not Path(new).exists(), "half an environment must not stay"

    # What pip says, in one line.
    (machine / "my work/requirements.txt").write_text("nothing==1\n")
    sayings = {
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on "
        "device": "the disk is full",
        "WARNING: Retrying (Retry(total=4)) after connection broken\nERROR: No matching "
        "distribution": "does not reach",
        "ERROR: No matching distribution found for nothing": "(ERROR: No matching "
        "distribution found for nothing)",
    }
    for saying, meaning in sayings.items():
        stub = "#!/bin/bash\n[[ $1 == -c ]] && exit\n[[ $1 == -m ]] && cat <<'X'\n"
        stub += f"{saying}\nX\nexit 1\n"
        write_executable(machine / "my work/.venv/bin/python", stub)
        assert_error(setup_venv(machine), meaning)


def test_setup_venv_again_changes_nothing(machine):
    """With everything there it installs nothing and prints the table, with the packages' own
    reports in it."""
    packages = ("numpy", "protobuf")
    pins = "".join(f"{name}=={importlib.metadata.version(name)} # a reason\n" for name in packages)
    (machine / "my work/requirements.txt").write_text(f"# comment\n{pins}")
    done = setup_venv(machine, VENV=sys.prefix)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "install" not in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert all("ok" in rows[name] for name in (*packages, "torch", "bitsandbytes", "deepspeed"))
    assert re.search(r"^(\d+) of \1 checks passed$", done.stdout, re.M)


def load_script(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_venv_finds_what_is_wrong(tmp_path, capsys):
    check = load_script("jobs/check_venv.py")
    file = tmp_path / "requirements.txt"
    file.write_text("numpy==0.0.1\nno-such-package==1.0\n")
    with pytest.raises(SystemExit) as stop:
        check.main(["--pins", "--requirements", str(file)])
    assert stop.value.code == 1
    output = capsys.readouterr().out
    assert "failed: numpy, no-such-package" in output
    assert check.fits("2.13.0", "2.13.0+cpu")
    assert not check.fits("2.13.0", "2.13.1")
    assert not check.fits("2.13.0", None)
    (ok, said), (missing, _) = (
        check.own_report(["echo", "library failed to load"], "loaded", "failed to load"),
        check.own_report(["/no/such/program"], "", "x"),
    )
    assert (ok, said, missing) == (False, "library failed to load", False)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching a model asks for."""

    repositories: ClassVar[dict] = {}
    commit = "c0ffee" + "0" * 34

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if "/gated" in path:
            return self.answer(403, b"{}", X_Error_Code="GatedRepo")
        for name, folder in self.repositories.items():
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            if path.startswith(f"/api/models/{name}/tree/"):
                listing = [
                    {"type": "file", "path": file, "size": len(data), "oid": f"{len(data):040x}"}
                    for file, data in files.items()
                ]
                return self.answer(200, json.dumps(listing).encode())
            if path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
                info = {"id": name, "sha": self.commit, "siblings": siblings, "tags": []}
                return self.answer(200, json.dumps(info).encode())
            if path.startswith(f"/{name}/resolve/"):
                data = files[path.rsplit("/", 1)[1]]
                return self.answer(
                    200, data, ETag=f'"{abs(hash(data)):040x}"', X_Repo_Commit=self.commit
                )
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and caches of its own."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    Hub.repositories = {}
    yield server
    server.shutdown()


def fetch_error(fetch, capsys, name):
    with pytest.raises(SystemExit) as stop:
        fetch.main([name])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("error: ")
    return error


def make_repositories(folder):
    """The same fp16 weights in safetensors form, and as two .bin shards with an index; two tensors
    share memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = LlamaConfig(vocab_size=100, **shape, dtype="float16")
    state = LlamaForCausalLM(config).half().state_dict()
    safe, shards = folder / "safe", folder / "shards"
    for place in (safe, shards):
        config.save_pretrained(place)
    save_file(
        {name: tensor.clone() for name, tensor in state.items()},
        safe / "model.safetensors",
        {"format": "pt"},
    )
    (safe / "pytorch_model.bin").write_bytes(b"not to be fetched")
    (safe / "tf_model.h5").write_bytes(b"not to be fetched")
    names = list(state)
    state["model.norm.weight"] = state["model.layers.0.input_layernorm.weight"]
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, shards / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return safe, shards, state


def test_fetch_model(hub, tmp_path, capsys, monkeypatch):
    """Safetensors into the hub's cache, .bin converted bit by bit; both load without the hub.
    Again: nothing to do."""
    import torch
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM

    fetch = load_script("jobs/fetch_model.py")
    safe, shards, state = make_repositories(tmp_path)
    Hub.repositories = {"o/safe": safe, "o/shards": shards}
    for _ in range(2):
        for name in Hub.repositories:
            fetch.main([name])
        output = capsys.readouterr().out
        assert "MODEL=o/safe HF_HUB_OFFLINE=1" in output
        caches = os.environ["CACHE_ROOT"]  # a job by itself would look elsewhere
        assert f"-v MODEL=o/safe,HF_HUB_OFFLINE=1,CACHE_ROOT={caches}" in output
        converted = tmp_path / "cache/models/o--shards"
        assert f"MODEL={converted} " in output
    assert "convert" not in output
    assert sorted(file.name for file in converted.iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    cached = {file.name for file in (tmp_path / "hub_cache").rglob("snapshots/*/*")}
    assert cached == {"config.json", "generation_config.json", "model.safetensors"} & cached | {
        "config.json",
        "model.safetensors",
    }
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("o/safe", str(converted)):
        loaded = AutoModelForCausalLM.from_pretrained(name).state_dict()
        for key, tensor in state.items():
            same = torch.equal(loaded[key], tensor) and tensor.dtype == torch.float16
            assert same or key == "model.norm.weight"
        assert set(loaded) == set(state)


def test_fetch_model_errors(hub, tmp_path, capsys, monkeypatch):
    fetch = load_script("jobs/fetch_model.py")
    assert "o/gated is gated" in fetch_error(fetch, capsys, "o/gated")
    assert "no model at the hub" in fetch_error(fetch, capsys, "o/none")
    assert "no model at the hub" in fetch_error(fetch, capsys, "not a//name")
    safe, shards, _ = make_repositories(tmp_path)
    only_config = tmp_path / "only_config"
    only_config.mkdir()
    shutil.copy(safe / "config.json", only_config)
    Hub.repositories = {"o/safe": safe, "o/shards": shards, "o/config": only_config}
    assert "no weights" in fetch_error(fetch, capsys, "o/config")
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
        assert "do not fit" in fetch_error(fetch, capsys, "o/safe")
        assert "do not fit" in fetch_error(fetch, capsys, "o/shards")
        assert not list((tmp_path / "cache").rglob("*.bin"))
    (shards / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK\x03\x04 cut off")
    assert "cannot be read" in fetch_error(fetch, capsys, "o/shards")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "unset HF_HUB_OFFLINE" in fetch_error(fetch, capsys, "o/safe")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.shutdown()
    hub.server_close()
    assert "not reachable" in fetch_error(fetch, capsys, "o/other")


def test_convert_a_local_directory(tmp_path, capsys, monkeypatch):
    """A directory in place of a name: converted where it lies, its .bin files kept."""
    fetch = load_script("jobs/fetch_model.py")
    _, shards, _ = make_repositories(tmp_path)
    before = {file.name: file.read_bytes() for file in shards.iterdir()}
    monkeypatch.chdir(tmp_path)  # a name that a job would take for the hub's
    fetch.main([shards.name])
    assert f"MODEL={shards} " in capsys.readouterr().out
    after = {file.name: file.read_bytes() for file in shards.iterdir()}
    assert before.items() <= after.items()
    assert sum(name.endswith(".safetensors") for name in after) == 2
    assert set(json.loads(after["model.safetensors.index.json"])["weight_map"].values()) < set(
        after
    )
