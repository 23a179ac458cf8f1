// All names and messages are inserted as text, never as markup.
const $ = (id) => document.getElementById(id);
const show = (id, visible) => { $(id).hidden = !visible; };

function make(tag, text, ...classes) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  element.classList.add(...classes);
  return element;
}

const percent = (share) => {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${(100 * share).toFixed(share >= 0.9995 ? 0 : 1)} %`;
};
const short = (share) => (share >= 0.0995 ? `${Math.round(100 * share)} %` : `${(100 * share).toFixed(1)} %`);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const milliseconds = (seconds) => (seconds < 1 ? `${Math.max(1, Math.round(1000 * seconds))} ms` : `${seconds.toFixed(1)} s`);
const sum = (values) => values.reduce((total, value) => total + value, 0);

let model = null;
let current = null; // the request in progress
let stream = null;

function bar(share) {
  const element = make("span", undefined, "bar");
  element.style.setProperty("--share", Math.min(1, Math.max(0, share)));
  element.setAttribute("aria-hidden", "true");
  return element;
}

function label(text) {
  const element = make("span", text, "label");
  element.title = text;
  return element;
}

/* ---- the image ---- */

async function send(image, name) {
  if (model && image.size > model.max_bytes) {
    fail(`${name} has ${megabytes(image.size)}; the limit is ${megabytes(model.max_bytes)}.`);
    return;
  }
  current?.abort();
  const request = (current = new AbortController());
  preview(image, name);
  busy(true);
  const start = performance.now();
  try {
    const response = await fetch("/predict", { method: "POST", body: image, signal: request.signal });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    draw(answer, (performance.now() - start) / 1000);
  } catch (error) {
    if (request.signal.aborted) return; // another image was chosen
    fail(error instanceof TypeError || error instanceof SyntaxError
      ? "The server does not answer. Is netfission serve still running?"
      : `${name}: ${error.message}.`);
  }
  if (current === request) busy(false);
}

function preview(image, name) {
  const before = $("preview").src;
  $("preview").src = URL.createObjectURL(image);
  $("preview").alt = name;
  if (before) URL.revokeObjectURL(before);
  show("preview", true);
  show("invitation", false);
  show("another", true);
  $("drop").classList.add("filled");
}

$("preview").addEventListener("load", () => {
  $("preview").classList.toggle("tiny", $("preview").naturalWidth < 128);
});
// The browser cannot show it either.
$("preview").addEventListener("error", () => {
  show("preview", false);
  show("invitation", true);
  show("another", false);
  $("drop").classList.remove("filled");
});

function busy(now) {
  $("drop").classList.toggle("busy", now);
  $("result").classList.toggle("stale", now);
  $("result").setAttribute("aria-busy", now);
  if (now) show("error", false);
}

function fail(message) {
  $("error").textContent = message;
  show("error", true);
  show("result", false);
  show("empty", true);
  $("summary").textContent = "";
}

/* ---- the answer ---- */

function draw(answer, seconds) {
  show("error", false);
  show("empty", false);
  show("result", true);
  $("class").textContent = answer.class;
  $("share").textContent = percent(answer.probability);
  show("abstains", answer.abstains === true);
  drawEnsemble(answer);
  $("agreement").textContent = agreement(answer.exits);
  drawExits(answer);
  drawUncertainty(answer);
  $("time").textContent = `The server took ${milliseconds(answer.seconds)}; with the transfer it was ${milliseconds(seconds)}.`;
  $("summary").textContent = `${answer.class}, ${percent(answer.probability)}. ${agreement(answer.exits)}`;
}

const others = (listed) => model.classes.length - listed.length;
const otherName = (count) => (count === 1 ? "1 other class" : `${count} others`);

function drawEnsemble(answer) {
  const row = (name, share, ...classes) => {
    const item = make("li", undefined, ...classes);
    item.append(label(name), bar(share), make("span", percent(share), "number"));
    return item;
  };
  const listed = answer.probabilities;
  const rows = listed.map((one) => row(one.class, one.probability));
  if (others(listed)) rows.push(row(otherName(others(listed)), 1 - sum(listed.map((one) => one.probability)), "rest"));
  $("ensemble").replaceChildren(...rows);
}

function agreement(exits) {
  if (exits.length === 1) return "This network has one exit.";
  const votes = new Map();
  exits.forEach((exit, number) => votes.set(exit.class, [...(votes.get(exit.class) ?? []), number]));
  if (votes.size === 1) return `All ${exits.length} exits predict ${exits[0].class}.`;
  const sides = [...votes].sort((one, other) => other[1].length - one[1].length);
  const groups = sides.map(([name, numbers]) => (numbers.length === 1 ? `exit ${numbers[0]} predicts ${name}` : `exits ${numbers.slice(0, -1).join(", ")} and ${numbers.at(-1)} predict ${name}`));
  return `${groups.join("; ")}.`.replace(/^e/, "E");
}

function drawExits(answer) {
  const listed = answer.probabilities;
  const columns = make("colgroup");
  columns.append(make("col", undefined, "names"), ...answer.exits.map(() => make("col", undefined, "exit")));

  const head = make("tr");
  head.append(make("td"));
  answer.exits.forEach((exit, number) => {
    const cell = make("th");
    cell.scope = "col";
    const isListed = listed.some((one) => one.class === exit.class);
    const vote = make("span", isListed ? exit.class : `${exit.class} ${short(exit.probability)}`, "vote");
    vote.title = vote.textContent;
    vote.classList.toggle("differs", exit.class !== answer.class);
    cell.append(make("b", `exit ${number}`), vote);
    head.append(cell);
  });

  const row = (name, shares, isVote, ...classes) => {
    const line = make("tr", undefined, ...classes);
    const title = make("th", name);
    title.scope = "row";
    title.title = name;
    line.append(title);
    shares.forEach((share, number) => {
      const cell = make("td");
      cell.classList.toggle("votes", isVote(number));
      const inner = make("div");
      inner.append(bar(share), make("span", short(share), "number"));
      cell.append(inner);
      line.append(cell);
    });
    return line;
  };
  const body = make("tbody");
  listed.forEach((one, place) => {
    body.append(row(one.class, answer.exits.map((exit) => exit.probabilities[place]), (number) => answer.exits[number].class === one.class));
  });
  if (others(listed)) {
    body.append(row(otherName(others(listed)), answer.exits.map((exit) => 1 - sum(exit.probabilities)), () => false, "rest"));
  }
  const top = make("thead");
  top.append(head);
  $("exits").replaceChildren(columns, top, body);
}

function drawUncertainty(answer) {
  const total = answer.entropy / Math.log(Math.max(2, model.classes.length));
  const disagreement = answer.mutual_information / Math.log(Math.max(2, Math.min(answer.exits.length, model.classes.length)));
  const level = (share, levels) => levels.find(([limit]) => share <= limit)[1];
  const entry = (term, share, words, number) => {
    const group = make("div");
    const definition = make("dd");
    const line = make("div", undefined, "level");
    line.append(make("span", words), make("span", number, "quiet", "small"));
    definition.append(bar(share), line);
    group.append(make("dt", term, "quiet"), definition);
    return group;
  };
  $("uncertainty").replaceChildren(
    entry("Total", total, level(total, [[0.05, "very low"], [0.25, "low"], [0.5, "moderate"], [0.8, "high"], [Infinity, "close to guessing"]]),
      `entropy ${answer.entropy.toFixed(3)} nats`),
    entry("From disagreement between exits", disagreement, level(disagreement, [[0.02, "very low"], [0.1, "low"], [0.3, "moderate"], [Infinity, "high"]]),
      `mutual information ${Math.max(0, answer.mutual_information).toFixed(3)} nats`),
  );
}

/* ---- where images come from ---- */

$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) send(file, file.name);
  $("file").value = ""; // so that the same file can be chosen again
});
$("another").addEventListener("click", () => $("file").click());

let inside = 0;
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    inside += { dragenter: 1, dragleave: -1 }[kind] ?? 0;
    if (kind === "drop") inside = 0;
    $("drop").classList.toggle("over", inside > 0);
  });
}
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) send(file, file.name);
  else fail("Only files can be dropped here. Save the image first, then drop the file.");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) send(file, "the pasted image");
});

function cameraOpen(open) {
  for (const id of ["camera", "take", "stop"]) show(id, open);
  show("drop", !open);
  show("start", !open);
  show("another", !open && !$("preview").hidden);
}

// Browsers offer the camera on this machine and over HTTPS only.
show("start", Boolean(navigator.mediaDevices?.getUserMedia));
$("start").addEventListener("click", async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    fail(error.name === "NotFoundError" ? "No camera was found." : "The camera cannot be used. Does the browser allow it?");
    return;
  }
  $("video").srcObject = stream;
  cameraOpen(true);
  await $("video").play();
  $("take").focus();
});

function cameraStop() {
  stream?.getTracks().forEach((track) => track.stop());
  $("video").srcObject = stream = null;
  cameraOpen(false);
}
$("stop").addEventListener("click", () => { cameraStop(); $("start").focus(); });
$("take").addEventListener("click", () => {
  const canvas = document.createElement("canvas");
  canvas.width = $("video").videoWidth;
  canvas.height = $("video").videoHeight;
  canvas.getContext("2d").drawImage($("video"), 0, 0);
  cameraStop();
  canvas.toBlob((image) => send(image, "the picture"), "image/jpeg", 0.95);
});

/* ---- the network ---- */

try {
  model = await (await fetch("/model")).json();
  const [, height, width] = model.image;
  document.documentElement.style.setProperty("--shape", width / height);
  document.title = `${model.name} – netfission`;
  $("name").textContent = model.name;
  const facts = [model.model, `${model.exits} ${model.exits === 1 ? "exit" : "exits"}`, `${model.classes.length} classes`];
  if (model.risk !== null) facts.push(`target risk ${percent(model.risk)}`);
  $("about").textContent = facts.filter(Boolean).join(" · ");
  $("seen").textContent = `The network sees the centre of the image at ${width} × ${height} pixels.`;
  $("curl").textContent = `curl --data-binary @image.jpg ${location.origin}/predict`;
} catch {
  fail("The server does not answer. Is netfission serve still running?");
}
