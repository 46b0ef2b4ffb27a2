"""What does not disturb each other is done at the same time; each test looks at what came of its own.

    def killed(lab: Lab) -> Any: ...           # a deed: what is done to a search, or to a user's commands

    @after(killed)
    def test_...(ended: Ended) -> None:
        found = ended()                        # what the deed has returned, or its exception

The first test that asks begins the deeds of all tests that are to run. Those of tests that use the tiny
family are whole commands, which need memory: a few of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from slurm_cluster import absent
from slurm_search import Lab, Labs, Lines, without_cluster

Deed = Callable[[Lab], Any]
Ended = Callable[[], Any]


def after(*deeds: Deed) -> pytest.MarkDecorator:
    """A test that comes after deeds; `ended()` is what that one, or a list of what each, has returned."""
    return pytest.mark.after.with_args(*deeds)


class Deeds:
    """All that are being done, or are over."""

    def __init__(self, labs: Labs):
        self._labs = labs
        self._searches, self._commands = ThreadPoolExecutor(64), ThreadPoolExecutor(3)
        self._futures: dict[Deed, Future[Any]] = {}

    def begin(self, deed: Deed, few: bool = False) -> None:
        """Do it, if it is not begun yet.

        Args:
            few: whether few of its kind may be done at a time.
        """
        if deed not in self._futures:
            lab = self._labs.lab(f"deed{len(self._futures)}")
            self._futures[deed] = (self._commands if few else self._searches).submit(deed, lab)

    def result(self, deed: Deed) -> Any:
        """What it has returned; raises what it has raised."""
        return self._futures[deed].result()


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labs]:
    """The clusters of this test process."""
    if absent():
        pytest.skip("needs a Slurm cluster")
    found = Labs(tmp_path_factory.mktemp("slurm"))
    try:
        found.begin()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="session")
def deeds(labs: Labs) -> Deeds:
    """Those of this test process."""
    return Deeds(labs)


@pytest.fixture
def ended(request: pytest.FixtureRequest, deeds: Deeds) -> Ended:
    """`ended()`: what came of the test's deed."""
    items = request.session.items  # all in this process; see `conftest.ByFile`
    tests = [(m.args, "family" in i.fixturenames) for i in items if (m := i.get_closest_marker("after"))]
    for few in (False, True):
        for deed in (d for wanted, large in tests if large is few for d in wanted):
            if few:
                request.getfixturevalue("family")
            deeds.begin(deed, few)
    wanted = request.node.get_closest_marker("after").args
    return lambda: [deeds.result(d) for d in wanted] if len(wanted) > 1 else deeds.result(*wanted)


@pytest.fixture(scope="session")
def undisturbed(labs: Labs) -> Lines:
    """The candidates of the same search without a cluster."""
    return without_cluster(labs.folder / "undisturbed", labs.setup)
