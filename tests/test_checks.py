"""What the learner and a recipe are given is checked; a sentence says what is wrong."""

import numpy as np
import pytest
from tensors import begun, identity, random_image, roll

from network import blur, recipes

Y = random_image(3, 33, 40).numpy()
ONES = np.ones((33, 40))


@pytest.mark.parametrize(
    ("y", "known", "words"),
    [
        (Y[0], None, r"y has the shape \(33, 40\); it must be \(C, H, W\)"),
        (Y.transpose(1, 2, 0), None, r"y has the shape \(33, 40, 3\)"),
        (Y[None], None, r"y has the shape \(1, 3, 33, 40\)"),
        (Y[:0], None, r"y has the shape \(0, 33, 40\)"),
        (Y[:, :31], None, "sides of 32 pixels or more"),
        ((255 * Y).astype(np.uint8), None, "y is of type uint8; it must be of floats"),
        (Y + 1j, None, "y is of type complex"),
        (Y, ONES, r"shape \(33, 40\); it must be \(1, 33, 40\) or \(3, 33, 40\)"),
        (Y, ONES[None].repeat(2, 0), r"known has the shape \(2, 33, 40\)"),
        (Y, ONES[None, :32], r"known has the shape \(1, 32, 40\)"),
        (Y[:1], ONES, r"known has the shape \(33, 40\); it must be \(1, 33, 40\)$"),
    ],
)
def test_arrays_of_another_shape_or_type_are_refused(y, known, words):
    for use in (recipes.adapt, lambda _, y, known: begun(y, known=known)):
        with pytest.raises(ValueError, match=words) as error:
            use("fast", y, known)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [1, 2, 31])
def test_any_small_number_of_channels_will_do(channels):
    y = random_image(channels, 32, 32)
    for known in (None, np.ones((1, 32, 32)), np.ones((channels, 32, 32), bool)):
        begun(y, known=known).train_step()
        recipes.adapt("fast", y.numpy(), known)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (lambda x: x.roll(1, -1), "changes a picture and has no `reach`"),
        (lambda x: 2 * x, "changes a picture and has no `reach`"),
        (
            lambda x: x[..., ::2],
            r"a Tensor \(1, 3, 33, 20\) for a picture \(1, 3, 33, 40\)",
        ),
        (lambda x: x.mean(1, keepdim=True), r"a Tensor \(1, 1, 33, 40\)"),
        (lambda x: x.numpy(), "gives a ndarray .* must give a tensor"),
    ],
)
def test_an_operator_is_no_other_than_it_says(operator, words):
    with pytest.raises(ValueError, match=words):
        begun(Y, operator)


def test_operators_that_change_nothing_need_no_reach():
    point = blur.CircularBlur(np.ones((1, 1)))
    for operator in (identity, lambda x: x, lambda x: x + 0, point):
        assert begun(Y, operator).window.reach == 0
    assert begun(Y, roll).window.reach == 1


def test_without_fusing_the_ensembles_image_is_the_result():
    learner = begun(Y, fuse="none")
    restored = learner.predict(2)
    image, error = learner.fuse(restored)
    assert error is None
    np.testing.assert_array_equal(image, restored.image)
