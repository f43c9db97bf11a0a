"""What waits is bounded in tokens; who is alone is always taken; who is sent away is told for how long."""

import pytest

from heliostat.serving.admission import Admission, Overloaded


def test_what_fits_does_not_wait_and_what_waits_is_bounded() -> None:
    admission = Admission(max_tokens=100, max_requests=8, max_queued_tokens=50)
    for number in range(5):
        admission.enter(number, 20)
    assert admission.waiting_tokens() == 0
    admission.enter("waits", 40)
    assert admission.waiting_tokens() == 40
    with pytest.raises(Overloaded):
        admission.enter("refused", 11)
    admission.enter("small", 10)
    admission.leave(0)
    assert admission.waiting_tokens() == 50, "first in, first out: the small one does not overtake"
    admission.leave(1)
    assert admission.waiting_tokens() == 10
    admission.leave(1)
    assert admission.waiting_tokens() == 10
    admission.leave("waits")
    assert admission.waiting_tokens() == 0


def test_requests_beyond_a_batch_wait_too() -> None:
    admission = Admission(max_tokens=1000, max_requests=2, max_queued_tokens=15)
    for number in range(3):
        admission.enter(number, 10)
    assert admission.waiting_tokens() == 10
    with pytest.raises(Overloaded):
        admission.enter("refused", 10)


def test_where_nothing_waits_any_request_is_taken() -> None:
    admission = Admission(max_tokens=10, max_requests=2, max_queued_tokens=1)
    admission.enter("huge", 500)
    with pytest.raises(Overloaded):
        admission.enter("next", 1)
    admission.leave("huge")
    admission.enter("next", 1)


def test_the_time_to_wait_follows_the_pace_and_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("heliostat.serving.admission.time.monotonic", lambda: now)
    admission = Admission(max_tokens=10, max_requests=100, max_queued_tokens=100)

    def wait(size: int) -> float:
        with pytest.raises(Overloaded) as caught:
            admission.enter("refused", size)
        return caught.value.retry_after

    admission.enter("waits", 100)
    assert wait(10) == 1.0, "nothing is known of the pace"
    for number in range(5):
        admission.enter(number, 0)
        now += 10.0
        admission.leave(number)
    admission.leave("waits")
    admission.enter("waits", 100)
    # 100 tokens went in 40 seconds.
    assert wait(20) == pytest.approx(8.0)
    assert wait(1) == 1.0
    assert wait(1000) == 30.0
