import pytest

from lorasmith.config import TrainConfig
from lorasmith.training.schedule import learning_rate


def rates(total=100, **changes):
    config = TrainConfig(learning_rate=1.0, **changes)
    return [learning_rate(step, total, config) for step in range(total)]


def test_warm_up_is_linear_and_its_first_step_moves():
    course = rates(warmup_ratio=0.1, lr_scheduler="constant")
    assert course[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(course[10:]) == {1.0}


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_rate_falls_from_its_peak_to_nearly_nothing(shape):
    course = rates(warmup_ratio=0.0, lr_scheduler=shape)
    assert course[0] == 1.0
    assert course == sorted(course, reverse=True)
    assert 0 < course[-1] < 0.02
    assert course[50] == pytest.approx(0.5)


def test_one_step_is_enough():
    assert rates(total=1, warmup_ratio=1.0) == [1.0]
    assert rates(total=1, warmup_ratio=0.0) == [1.0]
