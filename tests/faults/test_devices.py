"""1, 2 and 8 simulated devices are one run, whatever numbers it is begun and ended with."""

import pytest

from tests.faults import devices


@pytest.mark.timeout(900)
def test_same_losses_and_parameters_on_1_2_and_8_devices_also_across_a_resume(tmp_path, compiled_programs):
    found = devices.compare(tmp_path, compiled_programs, quickly=True)
    assert len(found) == 4
    for name, difference in found.items():
        assert difference["first_step_beyond"] is None, (name, difference)
        assert difference["loss"] <= devices.TOLERANCE, (name, difference)
        assert difference["parameter"] <= devices.TOLERANCE, (name, difference)
