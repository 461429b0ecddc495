"""Style, script and fixed text of the report: kept in the page, which needs nothing beside it."""

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5b6776;
--line:#e1e5ea;
--faint:#eef1f4;--c0:#1f6fd6;--c1:#d9730d;--c2:#8a94a1;--good:#0f7b6c;--bad:#b5432a;
--neutral:#f1f3f5;--on:#fff;
--n4:#f0977a;--n3:#f5b59e;--n2:#f9cfbf;--n1:#fce5dc;--p1:#dfeaf9;--p2:#c2d9f4;--p3:#9cc1ed;
--p4:#71a5e3;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--bg:#10151b;--card:#181f27;--ink:#e4e9ef;--soft:#95a1af;
--line:#2b343e;--faint:#222a33;--c0:#5ea3f5;--c1:#f0a04b;--c2:#6d7885;--good:#45c2ab;
--bad:#f08a6c;
--neutral:#252d36;--on:#3a4552;--n4:#a34a2c;--n3:#823d28;--n2:#633325;--n1:#452b25;--p1:#21344b;--p2
:#264669;
--p3:#2a5a8d;--p4:#2f6fb3}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1168px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px}
h2{font-size:20px;letter-spacing:-.01em;margin:52px 0 14px}
h3{font-size:14px;font-weight:600;margin:0}
p{margin:0 0 12px}a{color:var(--c0)}
code{font:.92em var(--mono)}
.sub{color:var(--soft);margin:0}
.sub code{color:var(--ink)}
.status{display:inline-block;margin-left:8px;padding:1px 9px;border-radius:99px;
background:var(--faint);
color:var(--soft);font-size:12.5px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px}
.stats{display:grid;grid-template-columns:repeat(6,auto);margin:26px 0 0;overflow:hidden}
.stat{padding:16px 18px;border-left:1px solid var(--line)}
.stat:first-child{border-left:0}
.stat dt{font-size:12.5px;color:var(--soft)}
.stat dd{margin:2px 0 0;font-size:23px;font-weight:600;letter-spacing:-.02em;white-space:nowrap;
font-variant-numeric:tabular-nums}
.stat dd .from{color:var(--soft);font-weight:400}
.stat small{display:block;font-size:12.5px;font-weight:400;letter-spacing:0;color:var(--soft)}
.stat small.up{color:var(--good)}.stat small.down{color:var(--bad)}
.curves{position:relative}
.pick{position:absolute;opacity:0;pointer-events:none}
.switch{display:flex;justify-content:space-between;align-items:center;flex-wrap:wrap;gap:8px;
margin:52px 0 14px}
.switch h2{margin:0}
.tabs{display:inline-flex;background:var(--faint);border:1px solid var(--line);border-radius:8px;
padding:2px}
.tabs label{padding:4px 13px;border-radius:6px;font-size:13.5px;color:var(--soft);cursor:pointer}
.tabs label:hover{color:var(--ink)}
#x-iterations:checked~.switch label[for=x-iterations],#x-tokens:checked~.switch
label[for=x-tokens],
#x-seconds:checked~.switch label[for=x-seconds],#t-first:checked~.switch label[for=t-first],
#t-last:checked~.switch label[for=t-last]{background:var(--on);color:var(--ink);
box-shadow:0 1px 2px rgba(0,0,0,.14)}
#x-iterations:focus-visible~.switch label[for=x-iterations],
#x-tokens:focus-visible~.switch label[for=x-tokens],
#x-seconds:focus-visible~.switch label[for=x-seconds],
#t-first:focus-visible~.switch label[for=t-first],
#t-last:focus-visible~.switch label[for=t-last]{outline:2px solid var(--c0)}
#x-iterations:checked~div svg:not(.x-iterations),#x-tokens:checked~div svg:not(.x-tokens),
#x-seconds:checked~div svg:not(.x-seconds){display:none}
#t-first:checked~.pane-last,#t-last:checked~.pane-first{display:none}
.grid{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:20px}
.hero{margin-bottom:20px}
.span2{grid-column:span 2}.span3{grid-column:span 3}
.narrow,.mid{display:none}
figure{margin:0;padding:14px 12px 8px;min-width:0}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 14px;padding:0 4px 8px}
figcaption small{display:inline-block;width:15px;height:15px;border-radius:50%;
background:var(--faint);
color:var(--soft);font-size:11px;line-height:15px;text-align:center;cursor:help;font-weight:400}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;font-size:13px;color:var(--soft)}
.key{white-space:nowrap}
.key b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key i{display:inline-block;width:12px;height:3px;border-radius:2px;vertical-align:middle;
margin-right:2px}
i.c0{background:var(--c0)}i.c1{background:var(--c1)}i.c2{background:var(--c2)}
svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .y{text-anchor:end}svg .x{text-anchor:middle}svg .cap{text-anchor:end;font-size:10.5px}
svg path{fill:none;stroke-width:1}
.axis{stroke:var(--soft);opacity:.55}.grid>figure .grid,svg .grid{stroke:var(--line)}
svg .raw{stroke-width:1;opacity:.3}svg .line{stroke-width:2;stroke-linejoin:round;
stroke-linecap:round}
path.c0{stroke:var(--c0)}path.c1{stroke:var(--c1)}path.c2{stroke:var(--c2)}
.area{opacity:.8}
path.area.c0{fill:var(--c0);stroke:none}path.area.c1{fill:var(--c1);stroke:none}
path.area.c2{fill:var(--c2);stroke:none}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}
circle.mark{stroke:var(--card);stroke-width:1.2}
svg .cross{stroke:var(--soft);stroke-dasharray:3 3;visibility:hidden}
svg .dot{stroke:var(--card);stroke-width:1.5;visibility:hidden}
.readout{min-height:1.5em;margin:10px 2px 0;font-size:13px;color:var(--soft);
font-variant-numeric:tabular-nums}
.empty{padding:34px 20px;color:var(--soft);text-align:center}
.facts{color:var(--soft);font-size:13.5px;display:flex;flex-wrap:wrap;gap:0 8px;
margin-bottom:10px}
.key-row{display:flex;flex-wrap:wrap;gap:4px 22px;font-size:13px;color:var(--soft);margin:0 0
16px;
align-items:center}
.cells{display:inline-flex;vertical-align:-2px;margin:0 5px;border-radius:3px;overflow:hidden}
.cells i{width:17px;height:13px}
.a-n4{background:var(--n4)}.a-n3{background:var(--n3)}.a-n2{background:var(--n2)}
.a-n1{background:var(--n1)}.a-0{background:var(--neutral)}.a-p1{background:var(--p1)}
.a-p2{background:var(--p2)}.a-p3{background:var(--p3)}.a-p4{background:var(--p4)}
.a-none{background:transparent}
.txt{font:13px/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;min-width:0}
u{text-decoration:underline dotted;text-decoration-thickness:2px;text-underline-offset:3px;
font-weight:700;cursor:help}
.nl::before{content:"\\21b5";opacity:.4;font-style:normal}
.cut{opacity:.65;font-style:italic}
.prompt{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tag{font-size:11.5px;color:var(--soft)}
.prompt .txt{max-height:20em;overflow:auto}
.meta{display:flex;flex-wrap:wrap;gap:2px 6px;align-items:center;font-size:12px;
font-variant-numeric:tabular-nums;white-space:nowrap}
.prompt .meta{margin-top:8px}
.answer{color:var(--soft)}.answer b{color:var(--ink)}
.v{padding:0 6px;border-radius:4px;border:1px solid color-mix(in srgb,var(--ink) 22%,transparent);
background:linear-gradient(90deg,color-mix(in srgb,var(--ink) 15%,transparent)
var(--v,0%),transparent 0)}
.a{font-weight:700}
.ok{color:var(--good);font-weight:700}.no{color:var(--bad);font-weight:700}
.seg .ok,.seg .no,.seg .out{color:inherit}
.seg .ok,.seg .no{padding:0 6px;border-radius:4px;background:var(--card)}
.seg .ok{color:var(--good)}.seg .no{color:var(--bad)}
.out{font-style:italic}
.end{font-size:11.5px}
.tree{margin-top:0;padding-top:14px;position:relative;overflow-x:auto;padding-bottom:4px}
.seg{border:1px solid color-mix(in srgb,var(--ink) 16%,transparent);border-radius:8px;padding:7px
10px;
display:flex;flex-wrap:wrap;gap:3px 12px;align-items:baseline;justify-content:space-between}
.seg>.txt{flex:1 1 150px}
.seg.done{border-right:4px solid color-mix(in srgb,var(--ink) 55%,transparent)}
.seg.over{border-right:4px dashed color-mix(in srgb,var(--ink) 45%,transparent)}
.seg.a-none{border-style:dashed}
.path .seg+.seg{margin-top:-1px}
.path .seg:not(:last-child){border-bottom-left-radius:0;border-bottom-right-radius:0}
.path .seg+.seg{border-top-left-radius:0;border-top-right-radius:0}
.kids{display:flex;flex-direction:column;gap:8px;padding-left:26px}
.kids>.node{position:relative}
.kids>.node::before{content:"";position:absolute;left:-14px;top:-8px;width:14px;height:26px;
border:solid var(--c2);border-width:0 0 1.5px 1.5px;border-bottom-left-radius:7px}
.kids>.node:not(:last-child)::after{content:"";position:absolute;left:-14px;top:0;bottom:-8px;
border-left:1.5px solid var(--c2)}
.node>.kids,.node>.fold>.kids{margin-top:8px}
summary{cursor:pointer;color:var(--soft);font-size:12.5px}
summary:hover{color:var(--ink)}
.fold>summary{margin:6px 0 0 14px}
.strand>summary{padding:2px 0 6px}.strand>summary span{margin-left:7px}
.probes{opacity:.85}.probes[open]{flex-basis:100%}
.probes ul{list-style:none;margin:5px 0 2px;padding:0 0 0 10px;
border-left:2px dotted color-mix(in srgb,var(--ink) 30%,transparent)}
.probes li{padding:3px 0;opacity:.9;font-size:12px}
.probes .txt{font-size:12px}.probes u{font-weight:400}
.prompt .probes{margin-top:6px}
@media (min-width:900px){
.wide-tree{container-type:inline-size}
.wide-tree .node{display:flex;align-items:flex-start}
.wide-tree .path{flex:none;width:calc((100cqw - 28px*var(--n))/var(--n));position:sticky;top:8px}
.wide-tree .kids .kids,.wide-tree .fold .kids{margin-top:0}
.wide-tree .fold>summary{margin:6px 0 6px 14px}
.wide-tree{overflow:visible}
.wide-tree .node .kids>.node:first-child::before{top:18px;left:-26px;width:26px;height:0;
border-radius:0;border-width:0 0 1.5px 0}
.wide-tree .node .kids>.node:first-child::after{top:18px}
.wide-tree .fold .kids>.node:first-child::before{left:-14px;width:14px}
}
.how{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:20px}
.how>div{padding:16px 20px}
.how h3{margin-bottom:6px}.how p{font-size:14px}.how p:last-child{margin:0}
.math{font-family:Cambria,"STIX Two Text","Times New Roman",serif;font-size:17px;line-height:1.7;
overflow-x:auto;white-space:nowrap;padding:2px 0 6px}
.config{columns:3;column-gap:20px}
.config table{break-inside:avoid;width:100%;border-collapse:separate;border-spacing:0;margin:0 0
16px;
font-size:13px;table-layout:fixed;overflow:hidden}
.config caption{text-align:left;font-weight:600;padding:0 2px 4px}
.config th,.config td{padding:4px 12px;text-align:left;font-weight:400;vertical-align:top;
overflow-wrap:anywhere;border-top:1px solid var(--line)}
.config tr:first-child>*{border-top:0}
.config th{color:var(--soft);width:52%}.config td{font-family:var(--mono);font-size:12.5px}
@media (max-width:1099px){
.wide{display:none}.narrow,.mid{display:block}.mid+.narrow{display:none}
.grid{grid-template-columns:repeat(2,minmax(0,1fr))}.span2{grid-column:auto}
.span3{grid-column:span 2}
.stats{grid-template-columns:repeat(3,1fr)}
.stat{border-top:1px solid var(--line);margin-top:-1px}.stat:nth-child(3n+1){border-left:0}
.config{columns:2}
}
@media (max-width:699px){
.mid{display:none}.mid+.narrow{display:block}
main{padding:22px 14px 48px}
h1{font-size:25px}
.grid{grid-template-columns:minmax(0,1fr);gap:14px}.span2,.span3{grid-column:auto}
.hero{margin-bottom:14px}
.stats{grid-template-columns:1fr 1fr}.stat{padding:12px 14px}.stat dd{font-size:20px}
.stat:nth-child(3n+1){border-left:1px solid var(--line)}.stat:nth-child(odd){border-left:0}
.kids{padding-left:18px}.tree>.kids{padding-left:16px}
.kids>.node::before,.kids>.node:not(:last-child)::after{left:-10px}
.kids>.node::before{width:10px}
.seg{padding:6px 8px}.seg>.txt{flex-basis:100%}
.how{grid-template-columns:minmax(0,1fr)}.config{columns:1}
.status{margin:6px 0 0;display:table}
}
@media print{.switch .tabs{display:none}.card,.seg{print-color-adjust:exact}}
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const svgs = [...document.querySelectorAll("svg[data-g]")];
const exp = s => s.replace(/e([-+])0*/, (m, sign) => "e" + (sign === "-" ? "-" : ""));
const fmt = (v, percent) => plain(v, percent).replaceAll("-", "\\u2212");
function plain(v, percent) {
  if (v === null || v === undefined) return "\\u2013";
  if (percent) return (100 * v).toFixed(1) + "%";
  const a = Math.abs(v);
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (a >= size * 0.99995) return (v / size).toFixed(1) + unit;
  return a && a < 1e-3 ? exp(v.toExponential(1)) : String(+v.toPrecision(3));
}
function known(values, i) {
  while (i >= 0 && values[i] === null) i--;
  return i;
}
function clock(s) {
  const two = n => String(Math.floor(n)).padStart(2, "0");
  return (s >= 3600 ? Math.floor(s / 3600) + ":" + two(s % 3600 / 60) : Math.floor(s / 60)) +
    ":" + two(s % 60);
}
function show(group, i) {
  const d = data[group];
  for (const svg of svgs) {
    if (svg.dataset.g !== group || !svg.getClientRects().length) continue;
    const [left, right, top, bottom, x0, x1, y0, y1] = svg.dataset.b.split(",").map(Number);
    const xs = d.x[svg.dataset.x], toX = x => left + (x - x0) / (x1 - x0) * (right - left);
    const cross = svg.querySelector(".cross");
    cross.style.visibility = i === null ? "hidden" : "visible";
    if (i !== null) cross.setAttribute("transform", `translate(${toX(xs[i]).toFixed(1)})`);
    for (const dot of svg.querySelectorAll(".dot")) {
      const values = d.y[dot.dataset.k], j = i === null ? -1 : known(values, i);
      dot.style.visibility = j < 0 ? "hidden" : "visible";
      if (j < 0) continue;
      dot.setAttribute("cx", toX(xs[j]));
      dot.setAttribute("cy", bottom - (values[j] - y0) / (y1 - y0) * (bottom - top));
    }
  }
  for (const b of document.querySelectorAll(`b[data-g="${group}"]`)) {
    const values = d.y[b.dataset.k], j = known(values, i === null ? values.length - 1 : i);
    b.textContent = fmt(j < 0 ? null : values[j], "p" in b.dataset);
  }
  const out = document.getElementById("readout");
  if (out && group === "run")
    out.textContent = i === null ? out.dataset.text : `At iteration ${d.x.iterations[i]}, ` +
      `${fmt(d.x.tokens[i])} sampled tokens, ${clock(d.x.seconds[i])}`;
}
for (const svg of svgs) {
  const group = svg.dataset.g;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const [left, right, , , x0, x1] = svg.dataset.b.split(",").map(Number);
    const px = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = x0 + (px - left) / (right - left) * (x1 - x0), xs = data[group].x[svg.dataset.x];
    let best = 0;
    xs.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = i; });
    show(group, best);
  });
  svg.addEventListener("pointerleave", () => show(group, null));
}
"""

HOW_TO_READ = """<section><h2>How to read this page</h2><div class="how">
<div class="card"><h3>The method</h3>
<p>Segment Policy Optimization (arXiv 2505.23564) gives credit to <em>segments</em> of an answer:
coarser than tokens, finer than whole answers. The value of a state <i>s</i> is its chance of a
right
answer, estimated by sampling, without a critic.</p>
<p>SPO-tree: the value of a leaf is its reward; that of any other node is the mean over its
children.</p>
<div class="math"><i>V</i>(<i>s</i>) = <sup>1</sup>&frasl;<sub>|<i>C</i>(<i>s</i>)|</sub>
&sum;<sub><i>c</i> &isin; <i>C</i>(<i>s</i>)</sub> <i>V</i>(<i>c</i>)<br>
<i>A</i>(<i>c</i>) = <i>V</i>(<i>c</i>) &minus; <i>V</i>(<i>s</i>)</div>
<p>SPO-chain: at each cut, <i>N</i> probes are sampled to the end and graded. A segment's
advantage is
the value after it less the value before it.</p>
<div class="math"><i>V</i>(<i>s</i><sub><i>k</i></sub>) = <sup>1</sup>&frasl;<sub><i>N</i></sub>
&sum;<sub><i>j</i></sub> <i>r</i><sub><i>j</i></sub><br>
<i>A</i><sub><i>k</i></sub> =
<i>V</i>(<i>s</i><sub><i>k</i>+1</sub>) &minus; <i>V</i>(<i>s</i><sub><i>k</i></sub>)</div>
<p>A may be normalised or whitened as the configuration says; the page shows what was trained
on.</p>
</div>
<div class="card"><h3>The pictures</h3>
<p><b>Accuracy.</b> Sampled answers are drawn at the evaluation's temperature, greedy ones take
the
likeliest token. Both are on questions that are not trained on.</p>
<p><b>Curves.</b> Choose what runs along the bottom: iterations compare updates, sampled tokens
compare
methods at equal cost, time compares what one waits for.</p>
<p><b>Rollout.</b> Each box is one segment; what follows it branches off. Blue boxes made a right
answer
more likely, orange ones less likely, grey ones changed nothing and teach nothing. A dashed box
has no
advantage. The bar in V is the value.</p>
<p><b>Marked tokens.</b> Those less likely than the threshold, where the policy made a choice: the
probability mask trains these. Probes are sampled for the estimate alone; open them to read.</p>
</div></div></section>"""
