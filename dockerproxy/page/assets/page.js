// Without this file the page has everything. With it: numbers that move, a list that is found while one types, values
// under the pointer, and commands that are copied. All text is set as text, never as markup.
"use strict";
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

const size = (number) => {
  for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
    if (number < 1000 || unit === "TB") return `${unit === "B" || number >= 100 ? number.toFixed(0) : +number.toPrecision(3)} ${unit}`;
    number /= 1000;
  }
};
const span = (seconds) => {
  seconds = Math.round(seconds);
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
};
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// Commands to copy. navigator.clipboard exists over TLS and on localhost only.
const copy = async (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
};
const enableCopying = () => {
  for (const button of $$(".copy")) {
    button.hidden = false;
    button.onclick = async () => {
      await copy($("code", button.parentElement).textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    };
  }
};

// Parts of the page as the server renders them now. They replace the shown ones by their ids.
let refreshing = false;
const refresh = async (address, ids) => {
  if (refreshing) return;
  refreshing = true;
  try {
    const response = await fetch(address, { headers: { Accept: "text/html" } });
    if (!response.ok || response.redirected) return;
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    for (const id of ids) {
      const [old, now] = [document.getElementById(id), fresh.getElementById(id)];
      if (old && now && !old.contains(document.activeElement)) old.replaceWith(document.adoptNode(now));
    }
    enableHover();
  } catch {
    // The server restarts. The next call will do.
  } finally {
    refreshing = false;
  }
};

// Values of the chart under the pointer.
const enableHover = () => {
  const plot = $(".plot");
  if (!plot || plot.dataset.ready) return;
  plot.dataset.ready = "yes";
  const series = JSON.parse(plot.dataset.series);
  const [box, cross, tip] = [$(".box", plot), $(".cross", plot), $(".tip", plot)];
  const bins = series.served.length;
  box.addEventListener("pointermove", (event) => {
    const edges = box.getBoundingClientRect();
    const bin = Math.min(bins - 1, Math.max(0, Math.round(((event.clientX - edges.left) / edges.width) * (bins - 1))));
    if (bins < 2) return;
    cross.hidden = tip.hidden = false;
    const x = (bin / (bins - 1)) * edges.width;
    const [served, downloaded] = [series.served[bin], series.downloaded[bin]];
    const at = new Date((series.start + bin * series.step) * 1000);
    const lines = [at.toLocaleString([], series.step < 3600 ? { hour: "2-digit", minute: "2-digit" } : { dateStyle: "medium", timeStyle: "short" }),
      `from the cache ${size(Math.max(0, served - downloaded) / series.step)}/s`, `downloaded ${size(downloaded / series.step)}/s`];
    if (served) lines.push(`${(100 * Math.max(0, served - downloaded) / served).toFixed(1)} % from the cache`);
    tip.textContent = lines.join("\n");
    cross.style.left = `${x}px`;
    tip.style.left = `${Math.max(0, Math.min(x + 12, edges.width - tip.offsetWidth))}px`;
  });
  box.addEventListener("pointerleave", () => { cross.hidden = tip.hidden = true; });
};

// The list of images, found while one types.
const enableSearch = () => {
  const form = $("#find");
  if (!form) return;
  let timer;
  const find = () => {
    const query = new URLSearchParams(new FormData(form));
    const address = `/images?${query}`;
    history.replaceState(null, "", address);
    refresh(address, ["image-list"]);
  };
  $("input[type=search]", form).addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(find, 200);
  });
};

// Downloads in progress, by Server-Sent Events.
const transfers = new Map();
const rows = () => $("#transfer-rows");
const showTransfer = (transfer) => {
  let row = $$("tr", rows()).find((each) => each.dataset.id === transfer.id);
  if (!row) {
    row = $("#transfer-row").content.firstElementChild.cloneNode(true);
    row.dataset.id = transfer.id;
    rows().append(row);
  }
  const percent = transfer.size ? Math.min(100, (100 * transfer.done) / transfer.size) : 0;
  const name = transfer.tag ? `${transfer.name}:${transfer.tag}` : transfer.name;
  $(".name", row).textContent = name;
  $("svg", row).setAttribute("aria-label", `downloaded of ${name}`);
  const part = [transfer.layer && transfer.layers && `layer ${transfer.layer} of ${transfer.layers}`, transfer.platform];
  $(".note", row).textContent = part.filter(Boolean).join(", ") || $(".note", row).textContent;
  $("rect", row).setAttribute("width", `${percent.toFixed(1)}%`);
  $("svg", row).setAttribute("aria-valuenow", Math.round(percent));
  $(".amount", row).textContent = transfer.size ? `${size(transfer.done)} of ${size(transfer.size)}` : size(transfer.done);
  $(".rate", row).textContent = transfer.rate ? `${size(transfer.rate)}/s` : "";
  $(".left", row).textContent = transfer.rate && transfer.size ? span((transfer.size - transfer.done) / transfer.rate) : "";
  $(".readers", row).textContent = counted(transfer.readers, "client");
};
// A download that is complete stays for a moment, with a full bar.
const endTransfer = (id, complete) => {
  const [transfer, row] = [transfers.get(id), $$("tr", rows()).find((each) => each.dataset.id === id)];
  transfers.delete(id);
  if (!row || !complete) return row?.remove();
  showTransfer({ ...transfer, done: transfer.size ?? transfer.done, size: transfer.size ?? transfer.done, rate: 0 });
  delete row.dataset.id;
  row.classList.add("complete");
  $(".left", row).textContent = "complete";
  setTimeout(() => { row.remove(); sumUp(); }, 2000);
};
const sumUp = () => {
  const all = [...transfers.values()];
  const sum = (key) => all.reduce((total, transfer) => total + (transfer[key] || 0), 0);
  $("#no-transfers").hidden = rows().children.length > 0;
  $("#transfer-sum").textContent = all.length ? `${counted(all.length, "download")} for ${counted(sum("readers"), "client")} · ${size(sum("rate"))}/s` : "";
};
const apply = (event) => {
  if (event.first) {
    transfers.clear();
    rows().replaceChildren();
  }
  for (const id of event.ended || []) endTransfer(id, event.completed?.includes(id));
  for (const change of event.transfers || []) {
    const transfer = { ...transfers.get(change.id), ...change };
    transfers.set(change.id, transfer);
    showTransfer(transfer);
  }
  sumUp();
};
const OVERVIEW = ["notices", "numbers", "traffic", "registries"];
const live = () => {
  if (!$("#transfers")) return;
  const dot = $("#live");
  const show = (works, text) => {
    dot.hidden = false;
    dot.classList.toggle("off", !works);
    dot.title = text;
  };
  let source, polling, again;
  const connect = () => {
    source = new EventSource("/api/v1/live");
    source.onmessage = (message) => {
      clearInterval(polling);
      show(true, "updated every second");
      const event = JSON.parse(message.data);
      apply(event);
      if (event.first || !event.registries?.length) return;
      refresh(location.href, OVERVIEW);
      clearTimeout(again);
      again = setTimeout(() => refresh(location.href, OVERVIEW), 3000); // the notices may have been two seconds old
    };
    source.onerror = () => {
      show(false, "not updated at the moment");
      if (source.readyState !== EventSource.CLOSED) return; // it connects again by itself
      clearInterval(polling);
      polling = setInterval(() => refresh(location.href, [...OVERVIEW, "transfers"]), 10000);
      setTimeout(connect, 60000);
    };
  };
  connect();
  addEventListener("pagehide", () => source.close());
  setInterval(() => refresh(location.href, OVERVIEW), 30000);
};

enableCopying();
enableHover();
enableSearch();
live();
