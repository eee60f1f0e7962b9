"""UEs with subscriptions on an emulated network: they just send."""

import subprocess
import sys

import pytest
from testbed_helpers import on_a_testbed

from scripts.testbed import Testbed
from upf.features import probe

pytestmark = pytest.mark.testbed
GET = "import httpx, sys; print(httpx.get(sys.argv[1], timeout=3, trust_env=False).text)"


def test_a_request_gets_there_without_a_page() -> None:
    if probe().packet_queue() is None:
        pytest.skip("the kernel has no NFQUEUE")

    def body(testbed: Testbed) -> None:
        service = testbed.catalogue.services_for("text-generation")[0]
        for ue, address in zip(
            testbed.network.ues, (service.address4, f"[{service.address6}]"), strict=False
        ):
            url = f"http://{address}:{service.port}/ready"
            asked = ue.popen([sys.executable, "-c", GET, url], stdout=subprocess.PIPE)
            answer, _ = asked.communicate(timeout=10)
            assert b'"ready":true' in answer
            [session] = testbed.request("GET", f"/sessions?ue={ue.name}")["sessions"]
            assert session["commits"][0]["cause"] == "FIRST_PACKET"
        parked = testbed.request("GET", "/status")["parked"]
        assert parked["stored"] == parked["released"] == 2

    on_a_testbed(body, subscribe=True)
