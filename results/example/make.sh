#!/usr/bin/env bash
# Makes what lies here: the page of the default run, and the README's picture of it. The picture needs Debian's
# chromium-driver and pngquant.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=runs/countdown-tiny-s0
[ -d "$run" ] || python train.py
[ -f "$run/eval.json" ] || python eval.py --model "$run"
python -m extras.report "$run" --out results/example/report.html
python tests/browser.py results/example/report.html results/example/page.png --part "#episode, #group"
pngquant 128 --force --output results/example/page.png results/example/page.png
