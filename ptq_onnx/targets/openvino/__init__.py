"""OpenVINO: Q/DQ that its plugins read as FakeQuantize."""
