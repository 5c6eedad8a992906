// Shows a mesh that can be turned, from the one kind of GLB that the service makes.

import { make } from "./browser.js";

const VERTEX = `
attribute vec3 at, colour, normal;
uniform mat4 turned;
uniform float aspect;
varying vec3 shade;
void main() {
  vec4 place = turned * vec4(at, 1.0);
  vec3 facing = (turned * vec4(normal, 0.0)).xyz;
  float light = 0.35 + 0.65 * abs(normalize(facing).z);
  shade = light * pow(colour, vec3(1.0 / 2.2));
  gl_Position = vec4(place.x / aspect, place.y, -place.z * 0.3, 1.5 - 0.3 * place.z);
}`;
const FRAGMENT = `
precision mediump float;
varying vec3 shade;
void main() { gl_FragColor = vec4(shade, 1.0); }`;

/** Gives the arrays of a GLB's only mesh. */
function readGlb(buffer) {
  const view = new DataView(buffer);
  const length = view.getUint32(12, true);
  const { accessors, bufferViews } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, length)));
  const arrays = accessors.map(({ componentType, count, type }, index) => {
    const Numbers = componentType === 5126 ? Float32Array : Uint32Array;
    return new Numbers(buffer, 28 + length + bufferViews[index].byteOffset, count * (type === "VEC3" ? 3 : 1));
  });
  return { positions: arrays[0], colours: arrays[1], indices: arrays[2] };
}

/** Gives for each corner the sum of its triangles' normals. */
function normalsOf(positions, indices) {
  const normals = new Float32Array(positions.length);
  for (let at = 0; at < indices.length; at += 3) {
    const [a, b, c] = [0, 1, 2].map((corner) => 3 * indices[at + corner]);
    const edge = (from, to) => [0, 1, 2].map((axis) => positions[to + axis] - positions[from + axis]);
    const [u, v] = [edge(a, b), edge(a, c)];
    for (const axis of [0, 1, 2]) {
      const [next, last] = [(axis + 1) % 3, (axis + 2) % 3];
      const part = u[next] * v[last] - u[last] * v[next];
      for (const corner of [a, b, c]) normals[corner + axis] += part;
    }
  }
  return normals;
}

/** Gives a turn to the right, then towards the reader, by columns. */
function turn(right, down) {
  const [s, c, t, d] = [Math.sin(right), Math.cos(right), Math.sin(down), Math.cos(down)];
  return [c, t * s, -d * s, 0, 0, d, t, 0, s, -t * c, d * c, 0, 0, 0, 0, 1];
}

export class ShapeView {
  #gl;
  #program;
  #count;
  #right = 0.6;
  #down = 0.4;

  constructor(buffer, words) {
    const label = `${words}: drag, or use the arrow keys, to turn it`;
    this.element = make("canvas", { tabindex: "0", role: "img", "aria-label": label });
    this.#gl = this.element.getContext("webgl");
    if (!this.#gl?.getExtension("OES_element_index_uint")) {
      this.element = make("p", { class: "note" }, "This browser shows no shapes: download it instead.");
      return;
    }
    this.#load(readGlb(buffer));
    this.element.addEventListener("pointermove", (event) => {
      if (event.buttons) this.#turn(event.movementX / 100, event.movementY / 100);
    });
    this.element.addEventListener("keydown", (event) => {
      const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
      if (right === undefined) return;
      event.preventDefault();
      this.#turn(right / 8, down / 8);
    });
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  #turn(right, down) {
    this.#right += right;
    this.#down = Math.max(-1.5, Math.min(1.5, this.#down + down));
    this.#draw();
  }

  #load({ positions, colours, indices }) {
    const gl = this.#gl;
    const program = this.#program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    gl.useProgram(program);
    const arrays = { at: positions, colour: colours, normal: normalsOf(positions, indices) };
    for (const [name, numbers] of Object.entries(arrays)) {
      gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ARRAY_BUFFER, numbers, gl.STATIC_DRAW);
      const place = gl.getAttribLocation(program, name);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 0, 0);
    }
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
    gl.enable(gl.DEPTH_TEST);
    this.#count = indices.length;
  }

  #draw() {
    const gl = this.#gl;
    const { clientWidth: width, clientHeight: height } = this.element;
    const dots = devicePixelRatio;
    Object.assign(this.element, { width: width * dots, height: height * dots });
    gl.viewport(0, 0, width * dots, height * dots);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.uniformMatrix4fv(gl.getUniformLocation(this.#program, "turned"), false, turn(this.#right, this.#down));
    gl.uniform1f(gl.getUniformLocation(this.#program, "aspect"), width / height);
    gl.drawElements(gl.TRIANGLES, this.#count, gl.UNSIGNED_INT, 0);
  }
}
