#!/bin/sh
# Makes sure that the browser tests find a Chromium.
set -eu

for browser in chromium chromium-browser google-chrome; do  # as tests/ui/lab.py looks for them
    command -v "$browser" >/dev/null 2>&1 && exit 0
done

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing Chromium for the browser tests" >&2
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        chromium fonts-dejavu-core
    exit 0
fi

echo "The browser tests need Chromium on the PATH; install it (Debian: sudo apt-get install chromium)." >&2
exit 1
