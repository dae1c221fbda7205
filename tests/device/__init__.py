"""What a device does with tsdyn: its tests, its agreement with the CPU, and its speed (``python -m tests.device``)."""
