"""The look of the report's page."""

CSS = """
:root { --ink: #1f2933; --soft: #52606d; --line: #e1e6eb; --paper: #ffffff; --ground: #f4f6f8; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); color-scheme: light;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }
header { margin-bottom: 20px; }
.eyebrow { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .04em; }
h1 { margin: 4px 0 8px; font-size: 34px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
.question { margin: 0; max-width: 760px; color: var(--soft); font-size: 18px; }
.warning { margin: 16px 0 0; padding: 10px 14px; border-left: 4px solid #e69f00; background: #fff6e0; }
section { margin: 0 0 20px; padding: 22px 26px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--paper); }
h2 { margin: 0 0 10px; font-size: 20px; }
.answer { border-top: 5px solid var(--soft); }
.answer.winner { border-top-color: #009e73; }
.answer.partly { border-top-color: #0072b2; }
.answer.tie, .answer.disputed { border-top-color: #e69f00; }
.pill { display: inline-block; padding: 3px 12px; border-radius: 999px; background: var(--soft); color: #fff;
  font-size: 13px; font-weight: 600; }
.winner .pill { background: #00785a; }
.partly .pill { background: #0072b2; }
.tie .pill, .disputed .pill { background: #a86f00; }
.verdict { margin: 10px 0 14px; font-size: 21px; line-height: 1.4; overflow-wrap: anywhere; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption, .note { margin: 8px 0 12px; color: var(--soft); font-size: 14px; }
figcaption { margin-bottom: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { padding-left: 0; text-align: left; }
thead th { border-bottom: 2px solid var(--line); color: var(--soft); font-weight: 600; vertical-align: bottom;
  white-space: normal; }
th small { display: block; color: var(--soft); font-weight: 400; font-size: 12px; }
tbody th { font-weight: 600; }
tr.marked td, tr.marked th { background: #eef8f4; }
tbody tr:last-child > * { border-bottom: 0; }
dl { display: grid; grid-template-columns: minmax(150px, 260px) 1fr; gap: 6px 18px; margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 20px; }
li { margin: 4px 0; }
summary { cursor: pointer; color: var(--accent); }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
