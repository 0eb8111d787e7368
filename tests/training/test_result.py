"""The last lines of a run, for every kind of model."""

from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.training.result import _last_lines

METRICS = {"val/loss": 2.0, "steps": 1000}
SPLIT = "the whole validation split"


def test_the_first_line_says_which_step_the_best_model_is_of(tmp_path):
    """It gives no loss of that step, which was measured on a part of the split."""
    done = "step 1,000, val/loss 2.0000 on the whole validation split"
    assert _last_lines(tmp_path, METRICS, SPLIT, 1000, is_own=True) == {"done": done}
    done += "; the best model is that of step 950"
    assert _last_lines(tmp_path, METRICS, SPLIT, 950, is_own=True) == {"done": done}


def test_a_model_that_infer_does_not_open_has_no_command(tmp_path):
    done = {"done": "step 1,000, val/loss 2.0000 on the whole validation split"}
    (tmp_path / "model").mkdir()
    with_model = done | {"model": str(tmp_path / "model")}
    assert _last_lines(tmp_path, METRICS, SPLIT, 1000, is_own=True) == with_model  # the data has no tokenizer
    (tmp_path / "model" / SentencePieceTokenizer.file_names[0]).touch()
    assert _last_lines(tmp_path, METRICS, SPLIT, 1000, is_own=False) == with_model  # a network of the user's own
    assert "next" in _last_lines(tmp_path, METRICS, SPLIT, 1000, is_own=True)


def test_the_command_allows_a_scheme_of_the_users_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / SentencePieceTokenizer.file_names[0]).touch()
    lines = _last_lines(tmp_path, METRICS, SPLIT, 1000, is_own=True, schemes=["mine.Threshold"])
    assert lines["next"].endswith(" 'prompt=Once upon a time' 'schemes=[mine.Threshold]'")
