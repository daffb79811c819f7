"""Quantize a Vision Transformer: the embedded one, or any ONNX file.

python example.py
python example.py --model vit_base.onnx --calib images/ --quantizer fqvit --bits 8/8/4
"""

import argparse
from pathlib import Path

from ptq_onnx import QuantizeConfig, find_model, one_line_errors, progress_bars, quantize, show

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "models" / "digits_vit.onnx"
DIGITS = ROOT / "img" / "digits"


def numbers(text: str) -> tuple[float, ...]:
    """``0.5,0.5,0.5``, one for each channel."""
    return tuple(float(part) for part in text.split(","))


def options() -> argparse.Namespace:
    """The command line; ``ptq-onnx quantize`` has all the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="float ONNX file (default: models/digits_vit.onnx)")
    add("--calib", help="calibration images (needed with --model)")
    add("--val", help="images to measure on (default: the embedded ones for the embedded model)")
    add("--labels", help="lines 'name label' for --val (default: its class folders, if any)")
    add("--quantizer", default="deploy", help="vanilla, channelwise, fqvit or deploy (default)")
    add("--bits", default="8/8/8", help="weights/activations/attention (default: 8/8/8)")
    add("--preprocess", help="imagenet or inception (default: the model's metadata, else imagenet)")
    add("--mean", type=numbers, help="from 0 to 1, as in 0.485,0.456,0.406")
    add("--std", type=numbers, help="as --mean")
    add("--no-check-preprocess", action="store_true", help="leave out the test of these three")
    add("--output", default="output", help="folder of the results (default: output)")
    return parser.parse_args()


def main() -> None:
    """Quantize, and show what it cost and where."""
    args = options()
    with one_line_errors():
        if args.model is None:
            args.model = MODEL
            args.calib = args.calib or DIGITS / "calib"
            if args.val is None and args.labels is None:
                args.val, args.labels = DIGITS / "val", DIGITS / "val.txt"
        config = QuantizeConfig(
            quantizer=args.quantizer,
            bits=args.bits,
            preprocess=args.preprocess,
            mean=args.mean,
            std=args.std,
            check_preprocess=not args.no_check_preprocess,
        )
        with progress_bars() as progress:
            result = quantize(
                find_model(args.model),
                config=config,
                calib=args.calib,
                val=args.val,
                labels=args.labels,
                output=args.output,
                progress=progress,
            )
        show(result)


if __name__ == "__main__":
    main()
