"""The batch script that `scatterfold launch --slurm` writes, run under fake commands of SLURM."""

import re
import subprocess

import pytest

FAKE_SRUN = """#!/usr/bin/env bash
echo "$@" >> srun.args
mkdir -p "$SCATTERFOLD_RUN_DIR/logs"
[ -n "${FINISHED:-}" ] || touch "$SCATTERFOLD_RUN_DIR/logs/unfinished"
exit ${CODE:-0}
"""


@pytest.fixture
def job(scatterfold, tiny, tmp_path):
    """`job(flags…, train=[…], **variables) -> (script, calls of scontrol)`: written, and run under fake commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scontrol = '#!/usr/bin/env bash\necho "$@" >> scontrol.args\n[ "$1" != show ] || echo node-7\n'
    for name, body in (("srun", FAKE_SRUN), ("scontrol", scontrol)):
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)

    def run(*flags, train=(), code=0, **variables):
        outcome = scatterfold("launch", "--slurm", "job.sh", *flags, "train", *tiny, *train)
        assert outcome.code == 0, outcome.err
        for log in tmp_path.glob("*.args"):
            log.unlink()
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NNODES": "2", **variables}
        environment = {"PATH": f"{folder}:/usr/bin:/bin", **slurm}
        done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return (tmp_path / "job.sh").read_text(), (tmp_path / "scontrol.args").read_text().splitlines()[1:]

    return run


def test_a_job_that_was_stopped_goes_back_to_the_queue(job, tmp_path):
    script, calls = job("--requeue", train=["run_dir=run"])
    assert "#SBATCH --requeue\n" in script and calls == ["requeue 4711"]
    assert job("--requeue", train=["run_dir=done"], FINISHED="1")[1] == []
    assert job("--requeue", train=["run_dir=failed"], CODE="3", code=3)[1] == []
    script, calls = job(train=["run_dir=run"])
    assert "requeue" not in re.sub("^#.*resumes.*$", "", script, flags=re.MULTILINE) and calls == []


def test_jobs_of_an_array_have_folders_of_their_own(job, tmp_path):
    script, _ = job("--array", "0-3", train=["run_dir=run"], SLURM_ARRAY_TASK_ID="2")
    assert "#SBATCH --array=0-3\n" in script and (tmp_path / "run" / "array-2" / "logs").is_dir()
    assert f"run_dir='{tmp_path}/run/array-2'" in (tmp_path / "srun.args").read_text()
    job("--array", "1-10%1", train=["run_dir=chain"], SLURM_ARRAY_TASK_ID="2")  # one run in ten jobs
    assert f"run_dir='{tmp_path}/chain'" in (tmp_path / "srun.args").read_text()


def test_setup_container_and_other_options(job, tmp_path):
    (tmp_path / "env.sh").write_text("export FROM_FILE=1\n")
    setup = ["--setup", "env.sh", "--setup", "echo $UNSET_IS_FINE ${FROM_FILE} > setup.out"]
    container = ["--container-image", "img.sqsh", "--container-mounts", "/data:/data"]
    script, _ = job(*setup, *container, "--cpus-per-task", 6, "--sbatch", "exclusive", "--sbatch", "reservation=moe")
    assert "#SBATCH --exclusive\n" in script and "#SBATCH --reservation=moe\n" in script
    assert (tmp_path / "setup.out").read_text() == "1\n"
    words = (tmp_path / "srun.args").read_text()
    assert "--cpus-per-task=6 --container-image=img.sqsh" in words and "--container-mounts=/data:/data" in words
    assert " python -m scatterfold.tools.launch " in words and "--nnodes 2 --rdzv-endpoint node-7:24711" in words


def test_the_cluster_is_asked_before_the_script_is_written(scatterfold, tiny, tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    sbatch.write_text(
        '#!/usr/bin/env bash\n[ "$1" = --test-only ] && bash -n "$2" && echo "Job 9 to start at noon" >&2\n'
    )
    sbatch.chmod(0o755)
    outcome = scatterfold("launch", "--slurm", "job.sh", "train", *tiny)
    assert outcome.code == 0 and "sbatch --test-only: Job 9 to start at noon" in outcome.out
    sbatch.write_text('#!/usr/bin/env bash\necho "allocation failure: Invalid partition" >&2; exit 1\n')
    outcome = scatterfold("launch", "--slurm", "other.sh", "--partition", "gpuu", "train", *tiny)
    assert outcome.code == 2 and "sbatch --test-only refuses the script: allocation failure" in outcome.line
    assert not (tmp_path / "other.sh").exists()
