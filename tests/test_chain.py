"""Cut and submitted again: the deadline, status 75 of every job, chains, sweeps, and containers."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import test_jobs
from test_jobs import (
    JOBS,
    ROOT,
    SYSTEM_PATH,
    TRAINING_JOBS,
    assert_error,
    calls,
    environment,
    last_words,
    machine,  # noqa: F401, a fixture
    run_as_pbs,
    source_env,
    variables,
    write_executable,
)
from test_multinode import run_ranks

# What qstat -f -F json printed on OpenPBS 23.06; %s: the time, a walltime, values of Variable_List.
JOB = """{
\t"timestamp":\t1795642379,
\t"pbs_version":\t"23.06.06",
\t"Jobs":\t{
\t\t"12.hnode001":\t{
\t\t\t"Job_Name":\t"q.sh",
\t\t\t"resources_used":\t{
\t\t\t\t"cpupercent":\t0,
\t\t\t\t"walltime":\t"00:00:01"
\t\t\t},
\t\t\t"ctime":\t"Sun Jan  1 00:00:00 2006",
\t\t\t"Error_Path":\t"hnode001:/home/u/d \\"stime\\":\\"x/q.sh.e2",
\t\t\t"Resource_List":\t{
\t\t\t\t"ncpus":\t32,
\t\t\t\t"select":\t"1:ncpus=32",
\t\t\t\t"walltime":\t"%s"
\t\t\t},
\t\t\t"stime":\t"%s",
\t\t\t"Variable_List":\t{
\t\t\t\t"PBS_O_SYSTEM":\t"Linux",
\t\t\t\t%s
\t\t\t},
\t\t\t"project":\t"g"
\t\t}
\t}
}
"""
FAKE = """"ARGS":\t"a"b",
\t\t\t"stime":\t"Sun Jan  1 00:00:00 2006",
\t\t\t"Resource_List":\t{
\t\t\t\t"walltime":\t"00:00:07"
\t\t\t},
"""
ZONE = {"TZ": "JST-9"}  # of the job, and of what qstat prints
BATCH = {"PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBID": "12.hnode001"}


@pytest.fixture(autouse=True)
def own_signals():
    """run_ranks.py, called in this process, ignores some, and what is started later would too."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def pbs_time(epoch):
    return datetime.fromtimestamp(epoch, timezone(timedelta(hours=9))).strftime("%a %b %e %T %Y")


@pytest.fixture
def asked(machine):  # noqa: F811
    """Run env.sh in a job; asked.qstat is what qstat does, asked.log how it was called."""

    def ask(after="env", **more):
        write_executable(
            machine / "pbs/qstat", f"#!/bin/bash\necho \"$@\" >>'{ask.log}'\n{ask.qstat}"
        )
        path = {"PATH": f"{machine / 'pbs'}:{SYSTEM_PATH}"}
        return source_env(machine, after=after, **(path | ZONE | BATCH | more))

    def answer(text):
        (machine / "answer").write_text(text)
        ask.qstat = f"cat '{machine / 'answer'}'"

    ask.qstat, ask.log, ask.answer = "exit 1", machine / "asked", answer
    return ask


def test_deadline_by_the_scheduler(asked):
    start = int(time.time()) - 5
    # Tabs and values that are no JSON; blanks, as older versions print it; more hours than a day.
    plain = JOB % ("01:02:03", pbs_time(start), '"A":\t"b"')
    for text, length in [
        (plain, 3723),
        (JOB % ("168:00:08", pbs_time(start), FAKE), 168 * 3600 + 8),
        (plain.replace("\t", "    ").replace(":    ", ":"), 3723),
    ]:
        asked.answer(text)
        done = asked()
        found = variables(done)
        assert (found["DEADLINE"], found["DEADLINE_OF"]) == (str(start + length), "12.hnode001")
        shown = datetime.fromtimestamp(start + length, timezone(timedelta(hours=9)))
        assert done.stdout.splitlines()[0].endswith(f" threads, deadline {shown:%Y-%m-%d %H:%M:%S}")
    array = asked(PBS_JOBID="12[3].hnode001")
    assert variables(array)["DEADLINE_OF"] == "12[3].hnode001"
    assert asked.log.read_text().splitlines()[-1] == "-f -F json 12[3].hnode001"


def test_no_deadline_is_no_obstacle(asked, machine):  # noqa: F811
    """Failing, empty, hanging or absurd answers: the job goes on, and its line says so."""
    now = int(time.time())
    real = shutil.which("timeout", path=SYSTEM_PATH)  # with a second in place of env.sh's 20
    write_executable(machine / "pbs/timeout", f'#!/bin/bash\nexec {real} -k 1 1 "${{@:4}}"\n')
    write_executable(machine / "pbs/sleep", "#!/bin/bash\n")  # before it asks again
    for qstat in ["exit 1", "", f"trap '' TERM; {shutil.which('sleep')} 99", "echo '{'"] + [
        f"cat <<'X'\n{JOB % given}X\n"
        for given in [
            ("01:00:00", pbs_time(now - 4000), FAKE),  # over already
            ("01:00:00", pbs_time(now + 9 * 3600), FAKE),  # another zone's clock
            ("01:00:00", "yesterday$(touch x)", FAKE),
            ("1 day", pbs_time(now), FAKE),
        ]
    ]:
        asked.qstat = qstat
        done = asked()
        found = variables(done)
        assert (found["DEADLINE"], found["DEADLINE_OF"]) == ("", "12.hnode001"), qstat
        assert done.stdout.splitlines()[0].endswith("deadline unknown (no answer from qstat)")
    assert not list(machine.rglob("x"))
    # A node of the job, which has inherited this, does not ask once more.
    asked.log.unlink()
    assert variables(asked(DEADLINE="", DEADLINE_OF="12.hnode001"))["DEADLINE"] == ""
    found = variables(source_env(machine))
    assert not asked.log.exists() and found["DEADLINE"] == found["DEADLINE_OF"] == ""


def test_deadline_that_is_given(asked):
    """By qsub -v or by hand it is kept, but for a walltime before it; one that another job found is not."""
    now = int(time.time())
    asked.answer(JOB % ("00:10:00", pbs_time(now), FAKE))
    given = str(now + 99)
    assert variables(asked(DEADLINE=given, DEADLINE_OF="12.hnode001"))["DEADLINE"] == given
    assert not asked.log.exists()
    assert variables(asked(DEADLINE=given))["DEADLINE"] == given
    late = variables(asked(DEADLINE=str(now + 9999)))  # PBS would kill before
    assert (late["DEADLINE"], late["DEADLINE_OF"]) == (str(now + 600), "12.hnode001")
    asked.qstat = "exit 1"
    assert variables(asked(DEADLINE=given))["DEADLINE"] == given
    # A server that is busy, once.
    once = asked.log.with_name("once")
    asked.answer(JOB % ("00:10:00", pbs_time(now), FAKE))
    asked.qstat = f"[[ -e '{once}' ]] || {{ touch '{once}'; exit 1; }}\n{asked.qstat}"
    assert variables(asked())["DEADLINE"] == str(now + 600)
    found = variables(asked(DEADLINE=given, DEADLINE_OF="11.hnode001"))
    assert (found["DEADLINE"], found["DEADLINE_OF"]) == (str(now + 600), "12.hnode001")
    asked.answer(JOB % ("120:00:00", pbs_time(now), FAKE))
    for minutes in (-2, 2):  # today if it is still to come, else tomorrow
        moment = datetime.now(timezone(timedelta(hours=9))) + timedelta(minutes=minutes)
        found = int(variables(asked(DEADLINE=f"{moment:%H:%M}"))["DEADLINE"])
        wanted = moment.replace(second=0, microsecond=0) + timedelta(days=minutes < 0)
        assert found == wanted.timestamp()
    for wrong in ("25:00", "soon", "12:5", "99", "1e9", "$(touch x)", "a[$(touch x)]", "1\n2"):
        assert_error(asked(DEADLINE=wrong), "is no time. Set it to HH:MM or seconds since 1970")


@pytest.mark.parametrize("kind", ["PBS_BATCH", "PBS_INTERACTIVE"])
def test_shell_of_a_job_waits_for_what_it_runs(machine, kind):  # noqa: F811
    """PBS signals shell and program at once; the program saves and its status is the job's."""
    saves = "trap 'sleep 0.5; echo saved; exit 75' TERM; kill -TERM $PPID $$; sleep 5 & wait"
    after = f"bash -c '{saves.replace(chr(39), chr(34))}'; echo status $?"
    more = {"PBS_ENVIRONMENT": kind, "DEADLINE": str(int(time.time()) + 99)}
    done = source_env(machine, options="", after=after, **more)
    if kind == "PBS_BATCH":
        assert done.stdout.endswith("===\nsaved\nstatus 75\n")
    else:
        assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_unfinished_is_the_status_of_every_job(machine, job):  # noqa: F811
    """75 of one process as it is; of several by run_ranks.py, whatever torchrun and mpirun say."""
    more = {"MODEL": "m"} if job.parent.name in ("finetune_dpo", "finetune_grpo") else {}
    run = functools.partial(run_as_pbs, machine, job, **more)
    if "node" not in job.name:
        assert run(STATUS="75").returncode == 75
    if job in TRAINING_JOBS or "node" in job.name:
        says = "stopped    at step 3\nTraceback: of the launcher"
        for status in ("0", "1"):
            done = run(GPUS_SEEN="2", SAYS=says, STATUS=status)
            assert done.returncode == 75, done.stdout
            lines = done.stdout.splitlines()
            assert "stopped    at step 3" in lines
            assert "failed" not in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("echo 'stopped    at 3' >&2", 75),
        ("echo '[rank0]: stopped    at 3' >&2; echo X >&2; exit 1", 75),
        ("echo '[1,0]<stderr>:[default0]:stopped    at 3' >&2; echo X >&2; kill -9 $$", 75),
        (r"printf ' 9%%|  \rstopped    at 3\n' >&2; echo X >&2; exit 1", 75),
        # Behind another rank's unfinished line; but an error that quotes such words stays one.
        ("echo 'Warning: xstopped    at 3' >&2", 75),
        ("echo 'ValueError: row \"stopped    x\"' >&2; echo X >&2; exit 1", 1),
        ("echo 'stopped    at 3'", 0),
        ('echo "stopped at 3 $RUN_RANKS" >&2; exit 5', 5),
        # More than a pipe holds after it must not block the launcher.
        ("echo 'stopped    at 3' >&2; seq 100000 >&2; exit 1", 75),
    ],
)
def test_run_ranks_gives_75(capfd, script, wanted):
    assert run_ranks.main(["bash", "-c", script]) == wanted
    error = capfd.readouterr().err
    assert ("failed" in error) == (wanted not in (0, 75))
    assert ("X" in error) == (wanted == 1)
    assert "RUN_RANKS" not in os.environ and ("at 3 1" in error) == (wanted == 5)


# A training's ranks as far as signals and statuses go: saving takes its time; the mark comes last.
RANKS = """
import os, signal, sys, time
from pathlib import Path
folder, last, rank = Path(sys.argv[1]), int(sys.argv[2]), os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda *_: (folder / "term").touch())
(folder / f"pid{rank}").write_text(f"{os.getpid()} {os.getppid()} {os.environ['DEADLINE']}")
step = 0
while step < last and not (folder / "term").exists():
    step += 1
    time.sleep(0.1)
time.sleep(float(sys.argv[3]))
(folder / f"saved{rank}").touch()
while len(list(folder.glob("saved*"))) < 2:
    time.sleep(0.05)
if rank == "0":
    print(f"stopped    at step {step}", file=sys.stderr, flush=True)
sys.exit(0 if os.environ.get("RUN_RANKS") else 75)
"""
SINGLE = "python ../jobs/run_ranks.py torchrun --standalone --nproc_per_node 2"
MULTI = '"${LAUNCH[@]}"'


@pytest.mark.parametrize(
    ("launch", "signalled"),
    [(SINGLE, ("launcher",)), (SINGLE, ("rank 1",)), (MULTI, ()), (MULTI, ("all",))],
)
def test_two_ranks_that_stop(tmp_path, launch, signalled):
    """Real launchers: by themselves, after SIGTERM to torchrun, to one rank, to all as PBS does."""
    if launch is MULTI and not shutil.which("mpirun"):
        pytest.skip("there is no mpirun")
    lesson, out = tmp_path / "lesson", tmp_path / "out"
    lesson.mkdir()
    out.mkdir()
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (lesson / "ranks.py").write_text(RANKS)
    (lesson / "hosts").write_text("localhost slots=2\n")
    source = "source ../jobs/multinode.sh" if launch is MULTI else ":"
    text = f"source ../jobs/env.sh && {source} && {launch} ranks.py '{out}' "
    # Longer than the second after which mpirun, as it is by itself, signals once more.
    text += f"{999 if signalled else 3} {3 if 'all' in signalled else 1}; status=$?; echo end; exit $status"
    keep = {name: os.environ[name] for name in ("PATH", "HOME")}
    env = keep | {"VENV": sys.prefix, "OMPI_ALLOW_RUN_AS_ROOT": "1", "PBS_ENVIRONMENT": "PBS_BATCH",
                  "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "NPROC_PER_NODE": "1", "NODES": "2",
                  "HOSTFILE": "hosts", "MAP_BY": "slot", "DEADLINE": "1999999999"}  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            ["bash", "-c", text], cwd=lesson, env=env, stdout=log, stderr=log, process_group=0
        )
    try:
        until = time.monotonic() + 60
        while not all((out / f"pid{n}").exists() and (out / f"pid{n}").read_text() for n in (0, 1)):
            assert time.monotonic() < until and job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        process, launcher, deadline = (out / "pid1").read_text().split()
        assert deadline == "1999999999"
        if signalled == ("all",):
            os.killpg(job.pid, signal.SIGTERM)  # this shell, run_ranks.py and mpirun ...
            for n in (0, 1):  # ... and what is below it; workers have a session of their own
                os.kill(int((out / f"pid{n}").read_text().split()[1]), signal.SIGTERM)
        elif signalled:
            os.kill(int(launcher if signalled == ("launcher",) else process), signal.SIGTERM)
        status = job.wait(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    lines = (tmp_path / "log").read_text().splitlines()
    assert status == 75, lines
    assert lines[-1] == "end" and re.fullmatch(r"stopped    at step \d+", lines[-2]), lines
    assert len(list(out.glob("saved*"))) == 2


QSUB = """#!/bin/bash
printf '%s\\n' "$PWD" "$@" "" >>"$CALLS"
n=$(($(cat "$CALLS.n" 2>/dev/null) + 1)); echo $n >"$CALLS.n"
if [[ $n == "$FAILS_AT" ]]; then echo "qsub: no" >&2; exit 188; fi
echo "$((11 + n))[].pbs1"
"""


def run_chain(machine, *arguments, where=".", **more):  # noqa: F811
    """(what chain.sh did, the calls of qsub as lists) from another directory."""
    record = machine / "qsub calls"
    for file in (record, Path(f"{record}.n")):
        file.unlink(missing_ok=True)
    env = environment(machine, CALLS=str(record), **more)
    env["PATH"] = f"{machine / 'pbs'}:{SYSTEM_PATH}"
    command = ["bash", str(machine / "my work/jobs/chain.sh"), *arguments]
    here = machine / "my work" / where
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
    text = record.read_text() if record.exists() else ""
    return done, [call.split("\n") for call in text.split("\n\n")[:-1]]


def test_chain(machine):  # noqa: F811
    write_executable(machine / "pbs/qsub", QSUB)
    options = ["-P", "g", "-v", "MODEL=/m/my model,ARGS=--a $(touch x) *", "-J", "1-4"]
    done, made = run_chain(machine, "3", "finetune_full/job.sh", *options)
    lesson = str(machine / "my work/finetune_full")
    assert made == [
        [lesson, *options, "job.sh"],
        [lesson, *options, "-W", "depend=afterany:12[].pbs1", "job.sh"],
        [lesson, *options, "-W", "depend=afterany:13[].pbs1", "job.sh"],
    ]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("job 1      12[].pbs1\njob 2      13[].pbs1, after 12[].pbs1\n")
    assert done.stdout.rstrip().endswith("qdel 14[].pbs1 13[].pbs1 12[].pbs1")
    done, made = run_chain(machine, "1", "finetune_full/job.sh")
    assert (done.returncode, len(made)) == (0, 1)
    assert not list(machine.rglob("x"))
    container = ["1", "../jobs/container.sh", "-v", "IMAGE=a"]  # runs the job.sh of where one is
    done, made = run_chain(machine, *container, where="finetune_full")
    assert made == [[lesson, "-v", "IMAGE=a", "../jobs/container.sh"]], done.stderr

    queued = " Those before are in the queue; remove them: qdel 13[].pbs1 12[].pbs1"
    for number, then in (("3", queued), ("1", " ")):
        done, made = run_chain(machine, "5", "finetune_full/job.sh", FAILS_AT=number)
        assert (done.returncode, len(made)) == (2, int(number))
        assert done.stderr == f"qsub: no\nerror: job {number} of 5 was not submitted.{then}\n"


def test_chain_that_is_asked_for_wrongly(machine):  # noqa: F811
    write_executable(machine / "pbs/qsub", QSUB)
    job = "finetune_full/job.sh"
    for arguments, said in [
        ((), "number of jobs is missing"),
        ((job, "3"), f"number of jobs is {job}"),
        (("0", job), "number of jobs is 0"),
        (("100", job), "number of jobs is 100"),
        (("a[$(touch x)]", job), "number of jobs is a["),
        (("3",), "no job file named"),
        (("3", "finetune_full"), "no job file finetune_full"),
        (("3", "-P", "g"), "no job file -P"),
    ]:
        done, made = run_chain(machine, *arguments)
        assert_error(done, said, "bash jobs/chain.sh 3 finetune_full/job.sh")
        assert not made
    (machine / "pbs/qsub").unlink()
    assert_error(run_chain(machine, "3", job)[0], "no qsub here", "login node")
    assert not list(machine.rglob("x"))


@pytest.mark.parametrize("job", TRAINING_JOBS, ids=str)
def test_sweep(machine, job):  # noqa: F811
    """Each job of an array has its line, as words that are never executed, and its output_dir."""
    lines = [
        "--seed 1",
        "--seed 2 * $(touch x) `touch x` \"a b' \\ $HOME;touch x\r",
        "",
        "--seed 4",
    ]
    (machine / "my work" / job.parent / "my sweep.txt").write_text("\n".join(lines))
    more = {"ARGS_FILE": "my sweep.txt", "ARGS": "--lr 3"}
    run = functools.partial(run_as_pbs, machine, job, **more)
    for index, place in (("1", "output/1"), ("2", "output/2"), ("4", "output/4")):
        done = run(PBS_ARRAY_INDEX=index)
        assert done.returncode == 0, done.stdout
        line = lines[int(index) - 1].rstrip("\r")
        assert done.stdout.splitlines()[0] == f"sweep     line {index} of my sweep.txt: {line}"
        words = last_words(machine)
        own = ["--lr", "3", *line.split()]
        assert own == [word for word in words if word not in ("--ddp_timeout",)][-len(own) :]
        assert words[words.index("--output_dir") + 1] == place
    assert run(PBS_ARRAY_INDEX="1", OUTPUT_DIR="output/my s").returncode == 0
    assert "output/my s/1" in last_words(machine)
    assert not list(machine.rglob("x"))


def test_sweep_without_a_line(machine):  # noqa: F811
    """No such line, an empty one, no index or none that is a number, no file: nothing starts."""
    (machine / "my work/finetune_full/my sweep.txt").write_text("--seed 1\n\n \r\n--seed 4")
    more = {"ARGS_FILE": "my sweep.txt", "ARGS": "--lr 3"}
    run = functools.partial(run_as_pbs, machine, Path("finetune_full/job.sh"), **more)
    for index in ("2", "3", "77"):
        done = run(PBS_ARRAY_INDEX=index)
        said = f"error: there is no line {index} in ARGS_FILE=my sweep.txt, or nothing in it\n"
        assert (done.returncode, done.stdout) == (2, said)
    for index in ("", "0", "1,$p", "1e touch x;"):
        done = run(PBS_ARRAY_INDEX=index)
        assert (done.returncode, done.stdout.count("ARGS_FILE needs the number of a line")) == (
            2,
            1,
        )
    assert run(PBS_ARRAY_INDEX="1", ARGS_FILE="/no/such").returncode == 2
    done = run(PBS_ARRAY_INDEX="1", CONFIG="my.yaml")
    assert (done.returncode, done.stdout.count("error: CONFIG has one output_dir for all")) == (
        2,
        1,
    )
    assert not calls(machine)
    assert not list(machine.rglob("x"))


NASTY = "$(touch x) `touch x` a[$(touch x)] \"; touch x; '\n touch x #|&*~"


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_no_variable_is_executed(machine, job):  # noqa: F811
    """Quotes, blanks, newlines, substitutions in every variable that a job file or its helpers
    read: nothing runs, and the program gets the value as one word or the job ends with an error."""
    text = (ROOT / job).read_text()
    names = {*re.findall(r"\$\{(\w+)[:+-]", text)} - {"PBS_ENVIRONMENT", "SETTINGS", "WORDS"}
    assert "ARGS" in names
    run = functools.partial(run_as_pbs, machine, job)
    kept = {"MPI_MODULE": ""} if "MPI_MODULE" in names else {}
    for more in [{}, {"CONFIG": NASTY, "GPUS_SEEN": "2"}][: 1 + ("CONFIG" in names)]:
        values = dict.fromkeys(names - {"CONFIG"}, NASTY) | kept
        if not more.get("GPUS_SEEN"):
            values.pop("DEEPSPEED", None)  # which needs a GPU
        for name in ("MODEL", "TRAIN_FILE", "OUTPUT_DIR") if "CONFIG" in more else ():
            values.pop(name)  # which it stands in place of
        done = run(**values, **more)
        assert done.returncode == 0, done.stdout
        wanted = (
            names
            - {"ARGS", "MPI_MODULE", "CONFIG", "MODEL_TYPE", "TASK"}
            - {"START_TIMEOUT", "COLLECTIVE_TIMEOUT"}
        )
        assert any(NASTY in argv for argv, *_ in calls(machine)) == bool(wanted)
    assert not list(machine.rglob("x"))


def test_no_variable_of_the_helpers_is_executed(machine):  # noqa: F811
    """As above, for what env.sh and multinode.sh read; whatever else becomes of the job."""
    names = ["DEADLINE", "PBS_ARRAY_INDEX", "ARGS_FILE", "HOSTFILE", "NCPUS", "PYTHON_MODULE", "GROUP",
             "VENV", "CACHE_ROOT", "NODES", "MAP_BY", "MASTER_PORT", "PBS_JOBID", "SECONDS"]  # fmt: skip
    for name in names:
        index = {"PBS_ARRAY_INDEX": "1"} if name == "ARGS_FILE" else {}
        more = {"ARGS_FILE": "/no"} if name == "PBS_ARRAY_INDEX" else {}
        run_as_pbs(
            machine, Path("finetune_full/job_multinode.sh"), **(index | more | {name: NASTY})
        )
    assert not list(machine.rglob("x"))


def test_node_sh_takes_no_program_for_a_number(machine):  # noqa: F811
    env = environment(machine, NODES="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    env["NODE_RANK"] = "a[$(touch x)]"
    command = ["bash", "../jobs/node.sh", "s.py"]
    lesson = machine / "my work/finetune_full"
    done = subprocess.run(command, cwd=lesson, env=env, capture_output=True, text=True)
    assert_error(done, "NODE_RANK=a[$(touch x)] is no number")
    assert not list(machine.rglob("x"))


def test_container(machine):  # noqa: F811
    """With a stand-in for singularity, which is not there: what it is told, what the job finds."""
    container = Path("jobs/container.sh")
    test_jobs.test_directives_are_what_pbs_and_abci_accept(container)
    write_executable(
        machine / "pbs/singularity", '#!/bin/bash\necho "told $*"\nPATH=$OUTSIDE\nexec "${@:6}"\n'
    )
    lesson = machine / "my work/finetune_full"
    (machine / "my image.sif").touch()
    given = {"IMAGE": str(machine / "my image.sif"), "VENV": str(machine / "my work/.venv")}
    deadline = {"DEADLINE": str(int(time.time()) + 99), "PBS_ARRAY_INDEX": "2"}
    (lesson / "sweep.txt").write_text("--seed 1\n--seed 2\n")
    run = functools.partial(run_as_pbs, machine, container, workdir=lesson, OUTSIDE=SYSTEM_PATH)
    run = functools.partial(run, PATH=f"{machine / 'pbs'}:{SYSTEM_PATH}", **deadline)
    done = run(**given, ARGS="--a 1", ARGS_FILE="sweep.txt", OUTPUT_DIR="output/c", STATUS="75")
    assert done.returncode == 75, done.stdout
    told = next(line for line in done.stdout.splitlines() if line.startswith("told "))
    start = f"told exec --nv --bind {machine / 'my work'},{machine / 'home/.cache'},{machine}/tmp/"
    assert told.startswith(start) and told.endswith("my image.sif bash job.sh")
    assert last_words(machine)[-4:] == ["--a", "1", "--seed", "2"]
    assert "output/c/2" in last_words(machine)
    assert done.stdout.count("deadline 20") == 2
    for wrong in ({"IMAGE": "/no"}, {"VENV": ""}, {"JOB": "none.sh"}):
        done = run(**given | wrong)
        assert (done.returncode, done.stdout.count("error: "), done.stdout.count("\n")) == (2, 1, 1)
