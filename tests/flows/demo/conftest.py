"""The demo's versions, each trained once for all tests of this folder."""

import pytest

from flows.demo.catalogue import DEMO_VERSIONS


@pytest.fixture(scope="package")
def trained():
    return {version.label: version.train() for version in DEMO_VERSIONS}
