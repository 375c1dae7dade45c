"""Debian's chromium, for the tests of pages; the fixture `browser` starts it."""

from __future__ import annotations

import os
import shutil

import pytest
from playwright.async_api import expect

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: install chromium, or set CHROMIUM"
)
expect.set_options(timeout=20_000)  # a machine may be busy
