"""``python -m ptq_onnx``: the same as the command ``ptq-onnx``."""

from ptq_onnx.cli.app import main

if __name__ == "__main__":
    main()
