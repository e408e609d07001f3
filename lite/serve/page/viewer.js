/** The film on a canvas: window and level, zoom and place. All of it happens here, on the server's rendering. */

import { $ } from "./dom.js";

const FRESH = { width: 255, level: 128, zoom: 1, x: 0, y: 0, inverted: false };
const LIMITS = { width: [1, 510], level: [0, 255], zoom: [1, 16] };

const canvas = $("canvas");
const pointers = new Map(); // by id, where it was last
let film = null; // what `decode` has returned, and is shown
let asked = false; // a frame

export const freshView = () => ({ ...FRESH });

/** Decode a film, which takes tens of megabytes; what comes of it is what `show` takes. */
export async function decode(png, view) {
  const bitmap = await createImageBitmap(new Blob([png]));
  const source = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = source.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const data = context.getImageData(0, 0, source.width, source.height);
  return { source, context, data, values: new Uint32Array(data.data.buffer.slice(0)), view, windowed: "" };
}

export function show(decoded) {
  film = decoded;
  for (const id of ["canvas", "controls", "canvas-hint"]) $(id).hidden = !film;
  $("empty").hidden = Boolean(film);
  $("cropped").hidden = film?.source.width === film?.source.height;
  redraw();
}

function redraw() {
  if (!asked) requestAnimationFrame(draw);
  asked = true;
}

function draw() {
  asked = false;
  if (!film) return;
  const { view, source } = film;
  applyWindow();
  const ratio = window.devicePixelRatio;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const context = canvas.getContext("2d");
  const scale = fit() * ratio * view.zoom;
  context.setTransform(scale, 0, 0, scale, canvas.width / 2 + view.x * ratio, canvas.height / 2 + view.y * ratio);
  context.imageSmoothingEnabled = scale < 4;
  context.imageSmoothingQuality = "high";
  context.drawImage(source, -source.width / 2, -source.height / 2);
  if (source.width !== source.height) drawCrop(context, scale / ratio);
  for (const name of ["width", "level"]) $(name).value = $(`${name}-is`).textContent = Math.round(view[name]);
  $("zoom-is").textContent = `${view.zoom.toFixed(1)} ×`;
  $("invert").setAttribute("aria-pressed", view.inverted);
}

/** Screen pixels per film pixel at zoom 1. */
const fit = () => Math.min(canvas.clientWidth / film.source.width, canvas.clientHeight / film.source.height);

function applyWindow() {
  const { values, data, context, view } = film;
  const wanted = `${view.width} ${view.level} ${view.inverted}`;
  if (film.windowed === wanted) return;
  film.windowed = wanted;
  const low = view.level - view.width / 2;
  const table = Uint8Array.from({ length: 256 }, (_, i) => {
    const share = Math.min(1, Math.max(0, (i + 0.5 - low) / view.width));
    return Math.round(255 * (view.inverted ? 1 - share : share));
  });
  const pixels = new Uint32Array(data.data.buffer);
  for (let i = 0; i < values.length; i++) {
    const value = values[i]; // each colour by itself: a photograph of a film keeps its tint
    pixels[i] = 0xff000000 | (table[(value >> 16) & 255] << 16) | (table[(value >> 8) & 255] << 8) | table[value & 255];
  }
  context.putImageData(data, 0, 0);
}

/** The model reads the centred square: mark its corners where there is more. */
function drawCrop(context, scale) {
  const side = Math.min(film.source.width, film.source.height);
  const arm = side / 20;
  context.lineWidth = 1.5 / scale;
  context.strokeStyle = "#6fb2e0";
  context.setLineDash([arm, side - 2 * arm, arm, 0]); // of each edge only its ends
  context.strokeRect(-side / 2, -side / 2, side, side);
}

function change(values) {
  Object.assign(film.view, values);
  const { view, source } = film;
  const clamp = (name, low, high) => (view[name] = Math.min(high, Math.max(low, view[name])));
  for (const [name, limits] of Object.entries(LIMITS)) clamp(name, ...limits);
  const half = (fit() * view.zoom) / 2; // the film's edge gets as far as the middle
  clamp("x", -source.width * half, source.width * half);
  clamp("y", -source.height * half, source.height * half);
  redraw();
}

const reset = () => change(FRESH);
const invert = () => change({ inverted: !film.view.inverted });
const move = (x, y) => change({ x: film.view.x + x, y: film.view.y + y });
const contrast = (width, level) => change({ width: film.view.width + width, level: film.view.level + level });

/** Zoom about a point, from the middle of the canvas on: it stays where it is. */
function zoom(factor, x = 0, y = 0) {
  const { view } = film;
  const to = Math.min(LIMITS.zoom[1], Math.max(1, view.zoom * factor));
  const by = to / view.zoom;
  change(to === 1 ? { zoom: 1, x: 0, y: 0 } : { zoom: to, x: x - (x - view.x) * by, y: y - (y - view.y) * by });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
}

function drag(event) {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const now = place(event);
  pointers.set(event.pointerId, now);
  const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
  if (other) {
    const apart = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
    move(dx / 2, dy / 2);
    zoom(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  } else if (event.pointerType === "touch" || event.shiftKey || event.buttons & 6) move(dx, dy);
  else contrast(dx, dy / 2);
}

const KEYS = {
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  0: reset,
  i: invert,
  ArrowLeft: ({ shiftKey }) => (shiftKey ? contrast(-8, 0) : move(40, 0)),
  ArrowRight: ({ shiftKey }) => (shiftKey ? contrast(8, 0) : move(-40, 0)),
  ArrowUp: ({ shiftKey }) => (shiftKey ? contrast(0, -4) : move(0, 40)),
  ArrowDown: ({ shiftKey }) => (shiftKey ? contrast(0, 4) : move(0, -40)),
};

export function listen() {
  const on = (name, act) => canvas.addEventListener(name, act, { passive: false });
  on("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
  });
  on("pointermove", drag);
  for (const name of ["pointerup", "pointercancel"]) on(name, (event) => pointers.delete(event.pointerId));
  // One finger scrolls the page past a film that is not zoomed; all else is ours.
  on("touchmove", (event) => {
    if (event.cancelable && (event.touches.length > 1 || film.view.zoom > 1)) event.preventDefault();
  });
  on("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), ...place(event));
  });
  on("contextmenu", (event) => event.preventDefault());
  on("keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    KEYS[event.key](event);
  });
  for (const name of ["width", "level"]) $(name).addEventListener("input", () => change({ [name]: Number($(name).value) }));
  const presses = { "zoom-in": KEYS["+"], "zoom-out": KEYS["-"], invert, reset };
  for (const [id, act] of Object.entries(presses)) $(id).addEventListener("click", act);
  new ResizeObserver(redraw).observe(canvas);
}
