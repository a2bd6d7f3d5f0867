"use strict";
(() => {
  const data = JSON.parse(document.getElementById("values").textContent);
  const page = document.getElementById("page");
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";

  // ---- building elements

  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined) node.append(child);
    }
    return node;
  };
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  // ---- words for numbers

  const percent = (share) => {
    const value = share * 100;
    return (value > 99 && value < 99.95 ? value.toFixed(1) : Math.round(value)) + "%";
  };
  const timestep = (t) => (t > 1 || t === 0 ? Math.round(t).toString() : t.toFixed(2));
  const macs = (gmacs) => (gmacs >= 1 ? gmacs.toFixed(2) + " GMACs" : (gmacs * 1000).toFixed(1) + " MMACs");
  const short = (hash) => (hash ? hash.slice(0, 12) : "");

  // ---- what was packed

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const bitsOf = (text) => {
    const packed = bytes(text);
    return (index) => (packed[index >> 3] >> (7 - (index & 7))) & 1;
  };

  // ---- the tooltip

  const showTip = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, Math.min(innerHeight - box.height - 4, event.clientY + 14)) + "px";
  };
  const hideTip = () => { tip.hidden = true; };

  const section = (id, title, lead, ...children) =>
    el("section", { id }, el("h2", {}, title), lead ? el("p", { class: "lead" }, lead) : null, ...children);

  // ---- claimed, counted, measured

  const cost = () => {
    const widest = Math.max(1, ...data.cost.map((row) => (row.interval ? Math.max(row.share, row.interval[1]) : row.share))) * 1.015;
    const bars = el("div", { class: "bars" });
    let group = "";
    for (const row of data.cost) {
      if (group && row.group !== group) bars.append(el("div", { class: "rule" }));
      bars.append(
        el("div", { class: "group" }, row.group === group ? "" : row.group),
        el("div", { class: "name" }, row.name),
        el("div", { class: "track " + row.group },
          el("div", { class: "fill", style: `width:${(row.share / widest) * 100}%` }),
          row.interval ? el("div", { class: "whisker", style: `left:${(row.interval[0] / widest) * 100}%;width:${((row.interval[1] - row.interval[0]) / widest) * 100}%` }) : null,
          el("div", { class: "one", style: `left:${100 / widest}%` })),
        el("div", { class: "share" }, row.share.toFixed(3)),
        el("div", { class: "words" }, row.words + (row.interval ? `; 95% interval ${row.interval[0].toFixed(3)} to ${row.interval[1].toFixed(3)}` : "")));
      group = row.group;
    }
    const facts = el("dl", { class: "facts" }, data.facts.map(([name, words]) => [el("dt", {}, name), el("dd", {}, words)]));
    return section("cost", "Claimed, counted, measured",
      data.cost.length ? "Shares of the static model; the line marks 1. MACs are multiply-accumulates, what the papers call FLOPs." : "",
      data.cost.length ? bars : null, facts);
  };

  // ---- the compute map

  const KINDS = { heads: "heads", groups: "channel groups", tokens: "tokens" };

  const computeMap = () => {
    const profile = data.profile;
    // Noisy to clean, as a sampler goes.
    const order = profile.noise.map((_, index) => index).sort((a, b) => profile.noise[b] - profile.noise[a]);
    const columns = order.length, depth = profile.depth;
    const left = 70, right = 96, top = 64, bottom = 46, width = 1064;
    const cellWidth = (width - left - right) / columns;
    const cellHeight = Math.max(9, Math.min(30, 440 / depth));
    const height = top + cellHeight * depth + bottom;
    let kind = "heads", chosen = { column: Math.floor(columns / 2), block: Math.floor(depth / 2) };

    const svg = draw("svg", { class: "map", viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "shape-rendering": "crispEdges" });
    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const units = el("div");
    const value = (column, block) => profile[kind][order[column]][block];
    const nameOf = (block) => {
      if (profile.double === null || profile.double === undefined) return `block ${block}`;
      return block < profile.double ? `double block ${block}` : `single block ${block - profile.double}`;
    };
    const wordsAt = (column, block) => {
      const share = value(column, block), count = profile.counts[kind];
      return `${(share * count).toFixed(share * count >= 100 ? 0 : 1)} of ${count} ${KINDS[kind]} (${percent(share)})`;
    };
    const levelAt = (column) => `t = ${timestep(profile.t[order[column]])}, ${percent(profile.noise[order[column]])} noise`;

    const cellAt = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) * width) / box.width, y = ((event.clientY - box.top) * height) / box.height;
      const column = Math.floor((x - left) / cellWidth), block = Math.floor((y - top) / cellHeight);
      return column >= 0 && column < columns && block >= 0 && block < depth ? { column, block } : null;
    };
    const frame = (name, cell) => draw("rect", {
      class: name, x: left + cell.column * cellWidth, y: top + cell.block * cellHeight, width: cellWidth, height: cellHeight,
    });
    let cross = null;

    const say = () => {
      const { column, block } = chosen, index = order[column];
      readout.replaceChildren(
        el("b", {}, `${nameOf(block)}, ${levelAt(column)}: `), wordsAt(column, block),
        `. All blocks at this noise level: ${percent(profile.ratio[index])} of the work, ${macs(profile.gmacs[index])}.`);
    };

    const drawUnits = () => {
      units.replaceChildren();
      if (!data.units || kind === "tokens") return;
      const packed = data.units[kind], bit = bitsOf(packed.bits), [, blocks, count] = packed.shape;
      const rowHeight = Math.max(5, Math.min(14, 230 / count)), stripHeight = rowHeight * count;
      const strip = draw("svg", { class: "strip", viewBox: `0 0 ${width} ${stripHeight + 4}`, role: "img" });
      let always = 0;
      for (let unit = 0; unit < count; unit++) {
        let on = 0;
        for (let column = 0; column < columns; column++) {
          const is = bit((order[column] * blocks + chosen.block) * count + unit);
          on += is;
          strip.append(draw("rect", {
            class: is ? "on" : "off", x: left + column * cellWidth + 0.5, y: unit * rowHeight + 0.5,
            width: Math.max(0.5, cellWidth - 1), height: Math.max(0.5, rowHeight - 1),
          }));
        }
        if (on === columns) always++;
        if (rowHeight >= 11 || unit === 0 || unit === count - 1) {
          strip.append(draw("text", { x: left - 8, y: unit * rowHeight + rowHeight / 2 + 4, "text-anchor": "end" }, String(unit + 1)));
          strip.append(draw("text", { x: width - right + 8, y: unit * rowHeight + rowHeight / 2 + 4 }, percent(on / columns)));
        }
      }
      units.append(
        el("h3", { style: "margin-top:20px" },
          `Which ${KINDS[kind]} of ${nameOf(chosen.block)} are on, by rank of importance (1 is the most important; ${always} of ${count} always on)`),
        strip);
    };

    const redraw = () => {
      svg.replaceChildren();
      svg.setAttribute("aria-label", `Share of ${KINDS[kind]} that are on, by noise level and block`);
      // The mean over blocks, above.
      const means = order.map((index) => profile[kind][index].reduce((sum, entry) => sum + entry, 0) / depth);
      const lineTop = 12, lineHeight = top - lineTop - 10;
      const points = means.map((mean, column) => [left + (column + 0.5) * cellWidth, lineTop + (1 - mean) * lineHeight]);
      svg.append(
        draw("path", { class: "area", d: `M${points[0][0]},${lineTop + lineHeight}` + points.map(([x, y]) => `L${x},${y}`).join("") + `L${points[columns - 1][0]},${lineTop + lineHeight}Z` }),
        draw("path", { class: "curve", "shape-rendering": "auto", d: "M" + points.map(([x, y]) => `${x},${y}`).join("L") }),
        draw("line", { class: "axis", x1: left, x2: width - right, y1: lineTop + lineHeight, y2: lineTop + lineHeight }),
        draw("text", { x: left - 8, y: lineTop + 5, "text-anchor": "end" }, "100%"),
        draw("text", { x: left - 8, y: lineTop + lineHeight + 4, "text-anchor": "end" }, "0"),
        draw("text", { x: width - 2, y: lineTop + lineHeight + 4, "text-anchor": "end" }, "mean"),
        draw("text", { x: width - right + 8, y: lineTop + 5 }, "all blocks"));
      for (let column = 0; column < columns; column++) {
        for (let block = 0; block < depth; block++) {
          svg.append(draw("rect", {
            class: "cell", style: `--v:${(value(column, block) * 100).toFixed(1)}%`,
            x: (left + column * cellWidth).toFixed(2), y: (top + block * cellHeight).toFixed(2),
            width: (cellWidth + 0.4).toFixed(2), height: (cellHeight + 0.4).toFixed(2),
          }));
        }
      }
      // The mean over noise levels, to the right; numbers of blocks to the left.
      const every = Math.max(1, Math.ceil(14 / cellHeight));
      for (let block = 0; block < depth; block++) {
        const mean = order.reduce((sum, index) => sum + profile[kind][index][block], 0) / columns;
        const y = top + block * cellHeight;
        svg.append(draw("rect", { class: "bar", x: width - right + 8, y: y + 1.5, width: Math.max(0.5, mean * (right - 48)), height: cellHeight - 3, rx: 1 }));
        if (block % every === 0) {
          svg.append(
            draw("text", { x: left - 8, y: y + cellHeight / 2 + 4, "text-anchor": "end" }, String(block)),
            draw("text", { class: "value", x: width - 2, y: y + cellHeight / 2 + 4, "text-anchor": "end" }, percent(mean)));
        }
      }
      if (profile.double) {
        const y = top + profile.double * cellHeight;
        svg.append(draw("line", { x1: left - 30, x2: width - right, y1: y, y2: y, stroke: "var(--paper)", "stroke-width": 2 }));
      }
      const middle = top + (depth * cellHeight) / 2;
      svg.append(draw("text", { x: 16, y: middle, "text-anchor": "middle", transform: `rotate(-90 16 ${middle})` }, "block"));
      const ticks = Math.min(columns, 9);
      for (let tick = 0; tick < ticks; tick++) {
        const column = ticks === 1 ? 0 : Math.round((tick * (columns - 1)) / (ticks - 1));
        const x = left + (column + 0.5) * cellWidth, y = top + depth * cellHeight + 16;
        svg.append(
          draw("text", { class: "value", x, y, "text-anchor": "middle" }, timestep(profile.t[order[column]])),
          draw("text", { x, y: y + 15, "text-anchor": "middle" }, percent(profile.noise[order[column]])));
      }
      svg.append(draw("text", { x: 4, y: top + depth * cellHeight + 16 }, "timestep"), draw("text", { x: 4, y: top + depth * cellHeight + 31 }, "noise"));
      svg.append(frame("chosen", chosen));
      cross = null;
      say();
      drawUnits();
    };

    svg.addEventListener("pointermove", (event) => {
      const cell = cellAt(event);
      if (cross) { cross.remove(); cross = null; }
      if (!cell) { hideTip(); return; }
      cross = frame("cross", cell);
      svg.append(cross);
      showTip(event, `${nameOf(cell.block)}, ${levelAt(cell.column)}\n${wordsAt(cell.column, cell.block)}`);
    });
    svg.addEventListener("pointerleave", () => { if (cross) cross.remove(); cross = null; hideTip(); });
    svg.addEventListener("click", (event) => { const cell = cellAt(event); if (cell) { chosen = cell; redraw(); } });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      chosen = {
        column: Math.max(0, Math.min(columns - 1, chosen.column + step[0])),
        block: Math.max(0, Math.min(depth - 1, chosen.block + step[1])),
      };
      redraw();
    });

    const tabs = el("div", { class: "tabs", role: "tablist" });
    for (const [name, words] of Object.entries(KINDS)) {
      tabs.append(el("button", {
        type: "button", role: "tab", "aria-selected": String(name === kind),
        onclick: (event) => {
          kind = name;
          for (const button of tabs.children) button.setAttribute("aria-selected", String(button === event.currentTarget));
          redraw();
        },
      }, words));
    }
    redraw();
    const seen = profile.images ? ` Mean over ${profile.images.toLocaleString("en")} samples.` : "";
    return section("map", "What is executed, by noise level and block",
      "From pure noise on the left to data on the right. Hover for values; click or use the arrow keys to choose a block and see its single units." + seen,
      el("div", { class: "row between" }, tabs, el("div", { class: "legend" }, "off", el("i"), "on")), svg, readout, units,
      profile.real === false ? el("p", { class: "small" }, profile.note) : null);
  };

  // ---- tokens over a sample

  const tokenMaps = () => {
    const tokens = data.tokens, [count, levels, depth, rows, columns] = tokens.shape;
    const perLevel = rows * columns;
    const mean = bytes(tokens.kept), bit = tokens.masks ? bitsOf(tokens.masks) : null;
    let level = Math.floor(levels / 2), block = -1, timer = null;
    const share = (sample, place) => block < 0
      ? mean[(sample * levels + level) * perLevel + place] / 255
      : bit(((sample * levels + level) * depth + block) * perLevel + place);

    const grid = (name, style) => {
      const cells = [];
      const svg = draw("svg", { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", "shape-rendering": "crispEdges" });
      for (let place = 0; place < perLevel; place++) {
        const cell = draw("rect", { class: name, x: place % columns, y: Math.floor(place / columns), width: 1, height: 1 });
        cells.push(cell);
        svg.append(cell);
      }
      return { svg, update: (sample) => cells.forEach((cell, place) => style(cell, share(sample, place))) };
    };
    const pixelated = tokens.pixelated ? "pixelated" : "";
    const figures = [];
    for (let sample = 0; sample < count; sample++) {
      const seen = el("img", { class: pixelated, alt: "" });
      const kept = el("img", { class: pixelated, alt: "" });
      const shade = grid("shade", (cell, value) => { cell.style.opacity = (0.9 * (1 - value)).toFixed(3); });
      const heat = grid("cell", (cell, value) => { cell.style.setProperty("--v", (value * 100).toFixed(0) + "%"); });
      const caption = el("figcaption");
      const box = (child, overlay) => el("div", { class: "frame", style: `aspect-ratio:${columns}/${rows}` }, child, overlay ? overlay.svg : null);
      const heatBox = el("div", { class: "frame", style: `aspect-ratio:${columns}/${rows}` }, heat.svg);
      heatBox.addEventListener("pointermove", (event) => {
        const area = heatBox.getBoundingClientRect();
        const column = Math.min(columns - 1, Math.floor(((event.clientX - area.left) / area.width) * columns));
        const row = Math.min(rows - 1, Math.floor(((event.clientY - area.top) / area.height) * rows));
        const value = share(sample, row * columns + column);
        showTip(event, `token in row ${row + 1}, column ${column + 1}\n` + (block < 0 ? `kept by ${Math.round(value * depth)} of ${depth} blocks` : value ? "kept by this block" : "left out by this block"));
      });
      heatBox.addEventListener("pointerleave", hideTip);
      const part = (words, child) => el("figure", {}, child, el("figcaption", {}, words));
      figures.push({
        node: el("div", {}, el("div", { class: "token" }, part("input", box(seen)), part("tokens kept", box(kept, shade)), part("share of blocks", heatBox)), caption),
        update: () => {
          seen.src = tokens.noised[sample][level];
          kept.src = tokens.clean[sample];
          shade.update(sample);
          heat.update(sample);
          let total = 0;
          for (let place = 0; place < perLevel; place++) total += share(sample, place);
          caption.replaceChildren(`${tokens.titles[sample]}: ${percent(total / perLevel)} of the tokens kept`);
        },
      });
    }
    const said = el("span", { style: "color:var(--ink)" });
    const slider = el("input", {
      type: "range", min: 0, max: levels - 1, step: 1, value: level, "aria-label": "noise level",
      oninput: () => { level = Number(slider.value); update(); },
    });
    const update = () => {
      said.textContent = `t = ${timestep(tokens.t[level])}, ${percent(tokens.noise[level])} noise`;
      slider.setAttribute("aria-valuetext", said.textContent);
      figures.forEach((figure) => figure.update());
    };
    const play = el("button", {
      type: "button", class: "play",
      onclick: () => {
        if (timer) { clearInterval(timer); timer = null; play.textContent = "play"; return; }
        play.textContent = "stop";
        timer = setInterval(() => { level = (level + 1) % levels; slider.value = level; update(); }, 350);
      },
    }, "play");
    const chooser = bit ? el("select", { "aria-label": "block", onchange: () => { block = Number(chooser.value); update(); } },
      el("option", { value: -1 }, "mean of all blocks"), Array.from({ length: depth }, (_, index) => el("option", { value: index }, `block ${index}`))) : null;
    update();
    return section("tokens", "Tokens over a sample",
      "The model's input at each noise level, and the tokens that its MLPs see there, over the clean sample." + (tokens.latents ? " Latents are shown by three of their channels." : ""),
      el("div", { class: "row controls" }, play, el("label", {}, "noisy", slider, "clean"), said, chooser ? el("label", {}, "of", chooser) : null),
      el("div", { class: "tokens" }, figures.map((figure) => figure.node)));
  };

  // ---- samples from the same noise

  const samples = () => {
    const { rows, labels, note, pixelated, video } = data.samples;
    const style = video ? "grid-template-columns:repeat(2, minmax(0, 1fr))" : `grid-template-columns:repeat(${Math.min(10, rows[0].images.length)}, minmax(0, 1fr))`;
    const look = pixelated ? "pixelated" : "";
    const strips = rows.map((row) => el("div", {}, el("h3", {}, row.title),
      el("div", { class: "images", style }, row.images.map((image, index) => el("img", { class: look, src: image, alt: `${row.title} ${labels[index] || ""}`, title: labels[index] || null })))));
    if (rows.length === 2) {
      strips.push(el("details", {}, el("summary", {}, "difference of the two"),
        el("div", { class: "images", style: style + ";margin-top:10px" }, rows[0].images.map((image, index) =>
          el("div", { class: "blend" }, el("img", { class: look, src: image, alt: "" }), el("img", { class: look, src: rows[1].images[index], alt: "" }))))));
    }
    return section("samples", "Samples from the same noise", note, el("div", { class: "strips" }, strips));
  };

  const models = () => {
    const names = Object.keys(data.models[0]);
    return section("models", "What was kept and what was lost", "Losses are on the same held-out samples, timesteps and noise.",
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, names.map((name) => el("th", {}, name)))),
        el("tbody", {}, data.models.map((row) => el("tr", {}, names.map((name) => el("td", {}, row[name] === null ? "" : String(row[name])))))))));
  };

  // ---- where it comes from

  const origin = () => {
    const stages = [...data.lineage].reverse();
    const list = stages.length ? el("ol", { class: "lineage" }, stages.map((stage) => el("li", { class: stage.state },
      el("b", {}, stage.stage), stage.words ? ` ${stage.words}` : "",
      stage.state === "changed" ? el("span", { style: "color:var(--warn)" }, " its weights have changed since") : null,
      el("div", { class: "small" }, stage.path, stage.state === "gone" ? " (no longer there)" : "", stage.sha256 ? ` · sha256 ${short(stage.sha256)}…` : "")))) : null;
    const settings = Object.entries(data.settings).filter(([, value]) => value !== null);
    return section("origin", "Where it comes from", "", list,
      data.recipe ? el("details", {}, el("summary", {}, "Recipe"), el("pre", {}, data.recipe)) : null,
      settings.length ? el("details", {}, el("summary", {}, "Settings of the last stage"), el("pre", {}, settings.map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join("\n"))) : null,
      el("details", {}, el("summary", {}, "Versions"), el("pre", {}, Object.entries(data.versions).map(([name, value]) => `${name} ${value}`).join("\n"))));
  };

  page.replaceChildren(
    el("header", {}, el("h1", {}, data.title), el("p", { class: "path" }, data.subtitle), el("p", { class: "verdict" }, data.verdict)),
    cost());
  if (data.models) page.append(models());
  if (data.units || data.cost.length) page.append(computeMap());
  if (data.tokens) page.append(tokenMaps());
  if (data.samples) page.append(samples());
  page.append(origin(), el("footer", {}, `Made by ${data.made.by}, ${data.made.at}. This file is complete in itself and asks the network for nothing.`));
  document.documentElement.dataset.ready = "yes";
})();
