"""The one error a user can cause, found wherever it was raised."""

import pytest
import torch
from monai.data import DataLoader, Dataset

from latdiff3d.errors import InputError, root_input_error


def raised(*chain):
    """Return the last of `chain`, each raised from the one before it."""
    error = None
    for following in chain:
        try:
            raise following from error
        except Exception as caught:
            error = caught
    return error


def test_an_input_error_is_found_at_any_depth_of_its_causes():
    mistake = InputError("a is wrong")
    assert root_input_error(mistake) is mistake
    assert root_input_error(raised(mistake, RuntimeError("applying transform"), RuntimeError("epoch"))) is mistake


def test_an_input_error_in_whose_handling_another_is_raised_is_found():
    try:
        try:
            raise InputError("a is wrong")
        except InputError:
            raise RuntimeError("while cleaning up")  # noqa: B904
    except RuntimeError as error:
        assert str(root_input_error(error)) == "a is wrong"


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("this is no latdiff3d.errors.InputError: at all")])
def test_another_error_is_none(error):
    assert root_input_error(error) is None


def test_a_workers_report_is_read():
    report = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nlatdiff3d.errors.InputError: a is wrong; do b. Or c.\n\nThe above exception was the '
        "direct cause of the following exception:\n\nRuntimeError: applying transform x\n"
    )
    found = root_input_error(raised(RuntimeError(report), RuntimeError("epoch")))
    assert isinstance(found, InputError) and str(found) == "a is wrong; do b. Or c."


def refuse(data):
    raise InputError(f"case {data['case']} is wrong; drop it.")


@pytest.mark.timeout(60)
def test_what_a_real_worker_refuses_is_one_line():
    with pytest.raises(RuntimeError) as error:
        list(DataLoader(Dataset([{"case": 7}], refuse), num_workers=1, generator=torch.Generator()))
    assert str(root_input_error(error.value)) == "case 7 is wrong; drop it."
