"""Where a number came from."""

import importlib.metadata
import os
import platform
import subprocess

import pytest

from launch import provenance


@pytest.fixture
def git(tmp_path, monkeypatch):
    """git(*command): stdout, in a repository of its own that holds one commit."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def run(*command):
        done = subprocess.run(["git", *command], cwd=tmp_path, capture_output=True, check=True)
        return done.stdout.decode().strip()

    run("init")
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    run("add", ".")
    run("commit", "-m", "first")
    provenance.commit.cache_clear()
    yield run
    provenance.commit.cache_clear()


def test_commit(git, tmp_path):
    assert provenance.commit(tmp_path) == git("rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["a.py", "new.py"])
def test_a_changed_or_a_new_file_is_said(git, tmp_path, name):
    (tmp_path / name).write_text("2")
    assert provenance.commit(tmp_path) == f"{git('rev-parse', 'HEAD')}+changes"


def test_results_change_no_number(git, tmp_path):
    (tmp_path / "experiments" / "results" / "study.md").write_text("2")
    assert provenance.commit(tmp_path) == git("rev-parse", "HEAD")


def test_outside_of_git_and_without_it_there_is_none(git, tmp_path, monkeypatch):
    assert provenance.commit(tmp_path.parent) is None
    provenance.commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(tmp_path) is None


def test_processor_and_versions():
    found = provenance.processor()
    assert found["kind"]
    assert found["cores"] == len(os.sched_getaffinity(0))
    versions = provenance.versions()
    assert versions["python"] == platform.python_version()
    assert versions["jax"] == importlib.metadata.version("jax")
