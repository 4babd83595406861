"""Training curve of a card as a PNG, which every Markdown viewer can show."""

import importlib.util
from io import BytesIO

from hf_stable.telemetry.reading.drawing import NotRecorded, styled
from hf_stable.telemetry.reading.history import History
from hf_stable.telemetry.reading.looks import dress
from hf_stable.telemetry.reading.loss_figure import draw_loss

DOTS_PER_INCH = 130


def draw_picture(history: History | None) -> bytes | None:
    """Draw training and validation loss by step; None without a logged loss or matplotlib.

    Equal records give equal bytes.
    """
    if history is None or importlib.util.find_spec("matplotlib") is None:
        return None
    with styled("card"):
        try:
            figure = draw_loss(dress([history]), [[]], [None])
        except NotRecorded:
            return None
        file = BytesIO()
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return file.getvalue()
