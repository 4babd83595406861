"""Laws of the error classes, by which callers tell bad input from results and bugs."""

from hf_stable import errors


def test_all_errors_but_divergence_are_bad_input() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type)}
    own = {each for each in classes if each.__module__ == errors.__name__}
    others = {each for each in own if not issubclass(each, errors.UserError)}
    assert len(own) > 4
    assert others == {errors.DivergedError}
    assert not issubclass(errors.DivergedError, ValueError)
