"""Style sheet and script of the report.

The script does one thing, move through the frames of a slider; without it, and on paper, all frames stand in a row.
"""

STYLE = """
:root{color-scheme:light dark;--ground:#fcfcfb;--sheet:#fff;--ink:#1c1d20;--soft:#5b606b;--line:#dfe1e6;--faint:#f1f2f4;
--accent:#0b5cad;--warn:#8a3b00;--warn-ground:#fff3e6;--good:#0f6b4f;
--c0:#0b5cad;--c1:#c2410c;--c2:#0f766e;--c3:#9d174d;--c4:#6d28d9;--c5:#57534e}
@media (prefers-color-scheme:dark){:root{--ground:#15171b;--sheet:#1c1f24;--ink:#e8e9ec;--soft:#a3a9b6;--line:#343943;
--faint:#23272e;--accent:#7ab8ff;--warn:#ffb86b;--warn-ground:#33261a;--good:#63d3a6;
--c0:#7ab8ff;--c1:#ffa15c;--c2:#5ad6c4;--c3:#f9a0c8;--c4:#c0a8ff;--c5:#d0cdc9}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);line-height:1.5;font-size:16px;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif;
font-variant-numeric:tabular-nums}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:2.1rem;line-height:1.15;letter-spacing:-.02em;margin:.15em 0 .5em;overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:0 0 .35em;line-height:1.25}
h3{font-size:1rem;margin:1.9em 0 .6em}
h4{font-size:.9rem;margin:1.4em 0 .5em;color:var(--soft)}
p{margin:.4em 0 1em}
section{padding:36px 0 8px;border-top:1px solid var(--line);margin-top:36px}
main>section:first-child{margin-top:0;border-top:0;padding-top:24px}
.eyebrow{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.08em;text-transform:uppercase}
.basis,.note,footer{color:var(--soft);font-size:.85rem}
.basis{margin:0 0 1.4em}
code,.hash{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.9em;
overflow-wrap:anywhere}
.banner{border-left:5px solid var(--warn);background:var(--warn-ground);padding:12px 18px;margin:0 0 24px;
border-radius:0 6px 6px 0;overflow-wrap:anywhere}
.banner strong{color:var(--warn);letter-spacing:.06em}
.facts{display:flex;flex-wrap:wrap;gap:10px 36px;margin:0 0 24px}
.facts dt,.card h3{color:var(--soft);font-size:.8rem;font-weight:400;margin:0}
.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;
font-size:.88rem;padding:12px 0;border:solid var(--line);border-width:1px 0}
a{color:var(--accent);text-underline-offset:3px;text-decoration-thickness:1px}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px;border-radius:2px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px;margin:0 0 18px}
.card{background:var(--sheet);border:1px solid var(--line);border-radius:8px;padding:14px 16px 12px}
.card h3 span{color:var(--accent);font-weight:700}
.card p{margin:.1em 0 0;font-size:1.6rem;font-weight:650;letter-spacing:-.02em;line-height:1.2}
.card p small{font-size:.85rem;font-weight:400;color:var(--soft);letter-spacing:0}
.card .n{font-size:.75rem;font-weight:400;color:var(--soft);letter-spacing:0;line-height:1.35;margin-top:.35em}
.missing{border:1px dashed var(--line);border-radius:8px;padding:10px 16px;margin:0 0 1.2em;font-size:.85rem}
.missing h3{margin:0 0 .3em;font-size:.85rem}.missing ul{margin:0;padding:0;list-style:none}
.missing li{margin:0 0 .25em;overflow-wrap:anywhere}
.missing b{font-weight:600}.missing b::after{content:":"}.missing span{color:var(--soft)}
.scroll{overflow-x:auto;margin:0 0 1.4em;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;min-width:min(100%,420px)}
caption{text-align:left;color:var(--soft);font-size:.82rem;padding:0 0 .6em}
th,td{padding:6px 14px 6px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:baseline;
white-space:nowrap}
thead th{border-bottom:2px solid var(--line);font-weight:600;vertical-align:bottom}
thead th span{color:var(--accent)}
th:first-child,td.t,th.t{text-align:left}
tbody th{font-weight:400}
td.t{white-space:normal;overflow-wrap:break-word;min-width:9em;max-width:62ch}
tbody td.t,thead th.t:not(:first-child){padding-left:14px}
td.t.soft{color:var(--soft)}
tbody tr:hover{background:var(--faint)}
td strong{color:var(--good)}
.heats{display:flex;flex-wrap:wrap;gap:8px 40px}.heats .scroll{max-width:100%}
table.heat{min-width:0;border-collapse:separate;border-spacing:3px}
table.heat td{padding:9px 16px;border:0;border-radius:4px;text-align:center}
table.heat th{border:0;padding:6px 12px 6px 0}
table.heat thead th{text-align:center}
.h0{--h:5%}.h1{--h:13%}.h2{--h:21%}.h3{--h:29%}.h4{--h:37%}.h5{--h:45%}
table.heat td{background:color-mix(in srgb,var(--c1) var(--h,0%),transparent)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:24px 32px;margin:0 0 1.6em}
.charts figure{background:var(--sheet);border:1px solid var(--line);border-radius:8px;padding:14px 16px 10px}
figure{margin:0;min-width:0}
figcaption{font-size:.82rem;color:var(--soft);overflow-wrap:anywhere}
.charts figcaption{color:var(--ink);font-weight:600;font-size:.92rem;margin:0 0 .3em}
.chart{display:block;width:100%;height:auto;overflow:visible}
.chart text{font-size:12px;fill:var(--soft)}.chart .name{fill:var(--ink)}
.chart .label{fill:var(--c);font-weight:600}
.rule{stroke:var(--line);stroke-width:1}.tick{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.mark{fill:var(--c);stroke:var(--sheet);stroke-width:1.2}
.bar{fill:var(--c)}.cells{fill:none;stroke:var(--line)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:.3em 0 .2em;padding:0;font-size:.8rem}
.legend svg{vertical-align:-2px;margin-right:6px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:22px 24px;margin:0 0 1.6em}
.pair>div{display:grid;grid-template-columns:1fr 1fr;gap:4px}
img{display:block;width:100%;height:auto;border-radius:3px;background:var(--faint)}
img.px{image-rendering:pixelated}
.pair figcaption{display:flex;justify-content:space-between;gap:12px;padding-top:5px}
.pair figcaption b{color:var(--ink);font-weight:600;white-space:nowrap}
.control{display:none;align-items:center;gap:16px;margin:.4em 0 1.2em;position:sticky;top:0;z-index:1;padding:10px 0;
background:var(--ground)}
.js .control{display:flex}
.control input{flex:1;max-width:440px;accent-color:var(--accent);height:28px}
.control output{font-weight:600}
.strips{display:grid;gap:22px 28px;grid-template-columns:1fr}
.js .strips{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.strip{display:flex;flex-wrap:wrap;gap:6px}
.strip figure{flex:0 0 140px}
.js .strip{flex-wrap:nowrap}.js .strip figure{flex:1 1 0}
@media screen{.js .frame:not(.on){display:none}}
.strip>p{flex:0 0 100%;margin:0;font-size:.82rem;color:var(--soft);overflow-wrap:anywhere;max-width:none}
.js .strip{flex-wrap:wrap}.js .strip figure{flex:1 1 calc(50% - 3px)}
dl.values{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 24px;font-size:.875rem;margin:0 0 1.4em}
dl.values dt{color:var(--soft)}dl.values dd{margin:0;overflow-wrap:anywhere}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 48px}
ul.lines{font-size:.85rem;padding-left:1.2em;overflow-wrap:anywhere}
footer{margin-top:48px;padding-top:16px;padding-bottom:40px;border-top:1px solid var(--line)}
@media (max-width:600px){body{font-size:15px}main,header,footer{padding-left:16px;padding-right:16px}
header{padding-top:28px}h1{font-size:1.6rem}section{padding-top:28px;margin-top:24px}.facts{gap:8px 24px}
.cards{grid-template-columns:1fr 1fr;gap:10px}.card{padding:10px 12px}.card p{font-size:1.35rem}
table:has(td.soft){display:block;min-width:0}table:has(td.soft) :is(tbody,caption){display:block}
table:has(td.soft) thead{display:none}
tr:has(td.soft){display:grid;grid-template-columns:1fr auto;border-bottom:1px solid var(--line);padding:6px 0}
tr:has(td.soft) :is(th,td){border:0;padding:0}tr:has(td.soft) td{font-weight:600}
tbody tr>td.t.soft{grid-column:1/-1;max-width:none;padding:0;font-weight:400;font-size:.8rem}
.charts figure{padding:10px 8px}.chart text{font-size:15px}.chart .label{font-size:14px}
dl.values{gap:4px 16px}}
@media print{:root{color-scheme:light;--ground:#fff;--sheet:#fff;--ink:#000;--soft:#444;--line:#bbb;--faint:#f1f2f4;
--accent:#0b5cad;--warn:#8a3b00;--warn-ground:#fff3e6;--good:#0f6b4f;
--c0:#0b5cad;--c1:#c2410c;--c2:#0f766e;--c3:#9d174d;--c4:#6d28d9;--c5:#57534e}
@page{size:A4;margin:15mm 14mm}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{font-size:9.5pt}main,header,footer{max-width:none;padding:0}header{padding-top:0}
nav,.js .control,.control{display:none}
section{padding:14pt 0 0;margin-top:14pt}
h2,h3,h4,caption,.basis{break-after:avoid}
figure,.card,.pair,.strip,tr,.missing li{break-inside:avoid}
.scroll{overflow:visible}table{font-size:7.5pt}th,td{padding:3pt 7pt 3pt 0}
.cards{grid-template-columns:repeat(5,1fr);gap:6pt}.card{padding:6pt 8pt}
.card p{font-size:13pt}.card .n{font-size:6.5pt}
.charts{grid-template-columns:1fr 1fr;gap:10pt}.pairs{grid-template-columns:repeat(3,1fr);gap:8pt}
.js .strips,.strips{grid-template-columns:1fr;gap:8pt}.js .strip,.strip{flex-wrap:wrap}
.js .strip figure,.strip figure{flex:0 0 calc((100% - 36px)/7)}
.basis,.note,footer,.strip>p{font-size:7.5pt}.missing,dl.values,ul.lines{font-size:8pt}
figcaption,.pair figcaption{font-size:6.5pt}.pair figcaption{display:block}.pair figcaption b{padding-left:6pt}
.charts figcaption{font-size:8.5pt}.legend{font-size:7.5pt}}
"""

SCRIPT = """
document.documentElement.classList.add("js");
for (const frames of document.querySelectorAll(".frames")) {
  const range = frames.querySelector("input"), output = frames.querySelector("output");
  const strips = [...frames.querySelectorAll(".strip")].map(strip => [...strip.querySelectorAll(".frame")]);
  const show = () => {
    for (const strip of strips) strip.forEach((frame, i) => frame.classList.toggle("on", i === Number(range.value)));
    output.textContent = strips[0][Number(range.value)].dataset.name;
  };
  range.addEventListener("input", show);
  show();
}
"""
