import os
import signal

import pytest

from scatterfold.moe.training.preemption import Preemption


@pytest.mark.parametrize("number", Preemption.SIGNALS)
def test_a_signal_is_remembered_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested
    assert signal.getsignal(number) == before
