"""What HTML reports are made of: frame, style, script and images as plain text, without any outside asset.

Readable on a phone, in light and in dark.
"""

from __future__ import annotations

import base64
import io

from PIL import Image


MAX_EDGE = 320
"""Larger images are shrunk to this edge, so that a report stays small enough to mail."""


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --bg: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #5c626b; --line: #e2e0db; --accent: #2b5fb4;
  --bad: #b3261e; --bad-bg: #fbe4e1; --good: #1b6b3a; --good-bg: #dff2e4; --track: #e7e5e0; --warn-bg: #fff1cf;
  --warn: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --card: #1e2125; --ink: #eceae6; --soft: #a3a9b2;
  --line: #33373d; --accent: #8ab4f8; --bad: #ffb4ab; --bad-bg: #5c1a17; --good: #8fdcaa; --good-bg: #12412a;
  --track: #33373d; --warn-bg: #4a3600; --warn: #ffd98a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .25rem 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; }
.lead, .note, .small { color: var(--soft); }
.note, .small { font-size: .85rem; }
.inset { padding: .3rem .8rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; vertical-align: top; border-top: 1px solid var(--line);
  white-space: nowrap; }
thead th { border-top: 0; font-size: .95rem; }
th:first-child, td:first-child { text-align: left; font-weight: 500; position: sticky; left: 0;
  background: var(--card); white-space: normal; min-width: 9rem; }
tr.group td { background: var(--bg); color: var(--soft); font-size: .78rem; text-transform: uppercase;
  letter-spacing: .05em; padding: .3rem .7rem; }
td .interval { display: block; color: var(--soft); font-size: .78rem; }
td.main { font-weight: 650; font-size: 1.05rem; }
td.main .interval { font-weight: 400; }
.whisker { display: block; position: relative; height: .45rem; margin: .25rem 0 .1rem auto; width: 100%;
  max-width: 9rem; min-width: 3.5rem; border-radius: 1rem; background: var(--track); }
.whisker i { position: absolute; top: 0; bottom: 0; border-radius: 1rem; background: var(--accent); opacity: .45; }
.whisker b { position: absolute; top: -.1rem; bottom: -.1rem; width: .2rem; margin-left: -.1rem; border-radius: 1rem;
  background: var(--accent); }
.warning { display: inline-block; margin-top: .35rem; white-space: normal; padding: 0 .5rem; border-radius: .3rem;
  font-size: .78rem; line-height: 1.35; font-weight: 600; background: var(--warn-bg); color: var(--warn); }
ul.plain { list-style: none; padding: 0; margin: 0; }
ul.plain li { padding: .35rem 0; border-top: 1px solid var(--line); }
ul.plain li:first-child { border-top: 0; }
.bar { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .4rem; align-items: center;
  padding: .55rem 0; background: var(--bg); }
.bar button, .bar label { font: inherit; font-size: .88rem; padding: .3rem .75rem; border-radius: 2rem;
  cursor: pointer; border: 1px solid var(--line); background: var(--card); color: var(--ink); }
.bar button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--bg); }
.bar label { display: inline-flex; gap: .4rem; align-items: center; margin-left: auto; }
.bar :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.gallery { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--wide)), 1fr)); }
.exhibit { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .8rem; }
.exhibit[hidden] { display: none; }
.exhibit h3 { font-size: .92rem; font-weight: 550; margin: 0 0 .15rem; overflow-wrap: anywhere; }
.exhibit .small { margin: 0 0 .5rem; }
.cells { display: grid; gap: .5rem; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); }
figure { margin: 0; min-width: 0; }
.frame { position: relative; aspect-ratio: 1; border-radius: .4rem; overflow: hidden; background: var(--track);
  display: grid; place-items: center; font-size: .75rem; color: var(--soft); text-align: center; padding: 0; }
.frame img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; display: block; }
.frame img.over { opacity: 0; }
.overlays .frame img.over { opacity: 1; }
.frame.unsafe::after { content: ""; position: absolute; inset: 0; border: 3px solid #c62828; border-radius: inherit; }
figcaption { font-size: .78rem; color: var(--soft); margin-top: .3rem; overflow-wrap: anywhere; }
figcaption strong { color: var(--ink); }
.badge { display: inline-block; padding: 0 .4rem; border-radius: .3rem; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.badge.unsafe { background: var(--bad-bg); color: var(--bad); }
.badge.safe { background: var(--good-bg); color: var(--good); }
.badge.none { background: var(--track); color: var(--soft); }
details { border: 1px solid var(--line); border-radius: .6rem; background: var(--card); padding: .5rem .8rem;
  margin-top: .6rem; }
summary { cursor: pointer; font-weight: 550; }
pre { overflow-x: auto; font-size: .78rem; line-height: 1.45; }
a { color: var(--accent); }
@media (max-width: 34rem) { main { padding: 1rem .6rem 2rem; } th, td { padding: .35rem .3rem; font-size: .9rem; }
  th:first-child, td:first-child { min-width: 5.6rem; font-size: .85rem; line-height: 1.3; padding-left: .6rem; }
  td:last-child, th:last-child { padding-right: .6rem; } td .interval { font-size: .68rem; letter-spacing: -.01em; }
  .bar { gap: .3rem; } .bar button, .bar label { padding: .25rem .6rem; font-size: .82rem; }
  .cells { gap: .35rem; } figcaption { font-size: .72rem; }
  h1 { font-size: 1.35rem; } .exhibit { padding: .6rem; } }
@media print { .bar { display: none; } .exhibit { break-inside: avoid; } }
"""

SCRIPT = """
const gallery = document.querySelector(".gallery");
for (const button of document.querySelectorAll(".bar button")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(".bar button"))
      other.setAttribute("aria-pressed", String(other === button));
    for (const exhibit of gallery.querySelectorAll(".exhibit"))
      exhibit.hidden = button.dataset.kind !== "all" && exhibit.dataset.kind !== button.dataset.kind;
  });
}
const overlays = document.querySelector("#overlays");
if (overlays) {
  const update = () => gallery.classList.toggle("overlays", overlays.checked);
  overlays.addEventListener("change", update);
  update();
}
"""


def data_uri(image: Image.Image, lossless: bool = True) -> str:
    """The image as a WebP `data:` address, shrunk to at most 320 pixels."""
    image = image.convert("RGB")
    if max(image.size) > MAX_EDGE:
        image.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small = lossless and image.width * image.height <= 128 * 128
    image.save(stream, "WEBP", lossless=small, quality=100 if small else 85, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
