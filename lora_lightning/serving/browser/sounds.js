// Sounds: recorded, made WAV, and their words with times, which play where they are clicked.
const RATE = 16000;

// Records until `stop` of what it returns is called; `ended` gets the file.
async function recording(ended) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const recorder = new MediaRecorder(stream), parts = [];
  recorder.addEventListener("dataavailable", event => parts.push(event.data));
  recorder.addEventListener("stop", async () => {
    stream.getTracks().forEach(track => track.stop());
    ended(await asWav(new Blob(parts, { type: recorder.mimeType }), "recording.wav"));
  });
  recorder.start();
  return recorder;
}

// Whatever the browser can play as WAV: one channel of 16 bits.
async function asWav(file, name) {
  const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  const view = new DataView(new ArrayBuffer(44 + 2 * sound.length));
  const word = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  word(0, "RIFF"); view.setUint32(4, 36 + 2 * sound.length, true); word(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);  // PCM, one channel
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  word(36, "data"); view.setUint32(40, 2 * sound.length, true);
  for (let i = 0; i < sound.length; i++) {
    const value = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    view.setInt16(44 + 2 * i, Math.round(32767 * Math.min(1, Math.max(-1, value))), true);
  }
  return new File([view.buffer], name, { type: "audio/wav" });
}

// `1:02.3`
function clock(seconds) {
  const tenths = Math.round(10 * seconds);
  return `${Math.floor(tenths / 600)}:${String(Math.floor(tenths / 10) % 60).padStart(2, "0")}.${tenths % 10}`;
}

// {text, start, end, words: [{text, start, end, confidence}]}; without words it is one piece, as Whisper's are
function segment(one, player) {
  const words = (one.words.length ? one.words : [one]).map(({ text, start, end, confidence }) => make(
    "button", {
      type: "button", class: "word", "data-start": start, "data-end": end,
      title: `${clock(start)} to ${clock(end)}${confidence >= 0 ? `, probability ${confidence.toFixed(2)}` : ""}`,
      onclick: () => { player.currentTime = start; player.play().catch(() => {}); },
    }, make("b", {}, short(text, 2000)), make("small", {}, clock(start)),
  ));
  return make("p", { class: "segment" }, ...words);
}

// The words that sound now are marked while the player plays, and where it stands.
function followed(player) {
  const mark = () => {
    const now = player.currentTime;
    for (const word of document.querySelectorAll(".word"))
      word.classList.toggle("now", now > 0 && now >= word.dataset.start && now < word.dataset.end);
    if (!player.paused) requestAnimationFrame(mark);
  };
  player.addEventListener("play", mark);
  player.addEventListener("seeked", mark);
}
