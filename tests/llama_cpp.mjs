// Asks llama.cpp, through npm's node-llama-cpp (prebuilt), what it makes of a GGUF file. Reads one JSON job from
// standard input and prints one JSON answer:
//   {model, texts, prompts, max_tokens, score, repeat}
//   -> {tokens: ids of each text, replies: greedy ids after each prompt, nll: -log p of each token of `score`,
//       template: the file's chat template, seconds: fastest of `repeat` greedy runs, a token}
//
//     npm install node-llama-cpp --ignore-scripts     # in any folder; name it in LLAMA_CPP
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
import path from "node:path";
import fs from "node:fs";

const found = createRequire(path.join(path.resolve(process.env.LLAMA_CPP), "x.js")).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found));

const job = JSON.parse(fs.readFileSync(0, "utf8"));
const threads = job.threads ?? 1;
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: threads});
const model = await llama.loadModel({modelPath: job.model});
const context = await model.createContext({contextSize: job.context ?? 1024, threads});
const sequence = context.getSequence();
const answer = {template: model.fileInfo.metadata.tokenizer.chat_template};

answer.tokens = (job.texts ?? []).map((text) => model.tokenize(text, job.special ?? false));
answer.replies = [];
answer.seconds = [];
for (const prompt of job.prompts ?? []) {
    await sequence.clearHistory();
    const ids = [];
    let start = 0;
    for await (const id of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (ids.length === 0) start = performance.now();
        ids.push(id);
        if (ids.length >= job.max_tokens) break;
    }
    answer.replies.push(ids);
    answer.seconds.push((performance.now() - start) / 1000 / (ids.length - 1));
}
answer.nll = [];
for (const row of job.score ?? []) {
    await sequence.clearHistory();
    const asked = row.slice(0, -1).map((id) => [id, {generateNext: {probabilities: true}}]);
    const out = await sequence.controlledEvaluate(asked);
    answer.nll.push(out.map((o, i) => -Math.log(o.next.probabilities.get(row[i + 1]) ?? 1e-45)));
}
console.log(JSON.stringify(answer));
await llama.dispose();
