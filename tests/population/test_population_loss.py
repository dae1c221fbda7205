import pytest
import torch

from tests.cases import rng
from tsdyn import Network
from tsdyn.networks import activations
from tsdyn.population.two_layer_loss import PopulationLoss, loss, loss_from_overlaps


def normal(*shape, seed=0, scale=0.7):
    return torch.from_numpy(rng(seed).standard_normal(shape)) * scale


def pair(name, outputs=1, *, inputs=5, nodes=2, teacher_nodes=3, members=3):
    """A loss and a batch of students as rows of parameters."""
    teacher = Network([normal(teacher_nodes, inputs), normal(outputs, teacher_nodes, seed=1)], activation=name)
    closed = PopulationLoss(teacher, nodes)
    students = normal(members, closed.parameters, seed=2)
    return closed, students


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("name", activations.NAMES)
def test_gradient_and_hessian_are_autograds(name, outputs):
    closed, students = pair(name, outputs)
    gradient = torch.func.vmap(torch.func.grad(closed.value))(students)
    torch.testing.assert_close(closed.gradient(students), gradient, rtol=1e-12, atol=1e-12)
    hessian = torch.func.vmap(torch.func.hessian(closed.value))(students)
    torch.testing.assert_close(closed.hessian(students), hessian, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_relu_derivatives_at_parallel_weights(name):
    """Nodes 1 and 2 parallel, node 3 opposite: the gradient is differentiable there and differences tell its slope."""
    closed, students = pair(name, nodes=3, members=1)
    w, a = closed.unpack(students)
    w[:, 1], w[:, 2] = 2 * w[:, 0], -0.5 * w[:, 0]
    at = torch.cat([w.flatten(-2), a.flatten(-2)], -1)[0]
    found = closed.hessian(at)
    assert torch.isfinite(found).all()
    # central differences err by step·|third| where a kink of sin θ is crossed: linear in the step, so 1e-5
    steps = 1e-6 * torch.eye(closed.parameters, dtype=torch.float64)
    differences = (closed.gradient(at + steps) - closed.gradient(at - steps)) / 2e-6
    torch.testing.assert_close(found, differences, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "erf", "silu", "tanh"])
def test_population_loss_is_the_mean_over_many_samples(name):
    closed, students = pair(name, outputs=2)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 5, generator=draw, dtype=torch.float64)
    for row, value in zip(students, closed.value(students), strict=True):
        error = (closed.network(row)(x) - closed.teacher(x)).square().sum(1)
        assert abs(error.mean() - value) <= 5 * error.std() / len(x) ** 0.5


def test_loss_of_networks_is_differentiable_and_zero_at_the_teacher():
    closed, students = pair("erf")
    students.requires_grad_()
    network = closed.network(students[0])
    loss(network, closed.teacher).backward()
    torch.testing.assert_close(students.grad[0], closed.gradient(students.detach())[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(closed.pack([network, network])[1], students.detach()[0])
    for name in activations.NAMES:
        teacher = Network(closed.teacher.weights, activation=name)
        # a difference of sums of 9 terms below 10: 1e-14
        assert abs(loss(teacher, teacher)) <= 1e-13


@pytest.mark.parametrize("name", ["erf", "relu"])
def test_loss_in_order_parameters(name):
    closed, students = pair(name)
    w, a = (v[0] for v in closed.unpack(students))
    v, b = closed.teacher.weights[0], closed.teacher.weights[1].T
    found = loss_from_overlaps(name, a, b, w @ w.T, w @ v.T, v @ v.T)
    torch.testing.assert_close(found, closed.value(students)[0], rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"has eigenvalue -.*overlaps of weights have no negative one"):
        loss_from_overlaps(name, a, b, w @ w.T, 10 * (w @ v.T), v @ v.T)


def test_bad_input_is_named():
    teacher = Network([normal(3, 5), normal(1, 3)], activation="erf")
    with pytest.raises(ValueError, match=r"the student is Network\(5-2-2-1.*the population loss is of two layers"):
        loss(Network([normal(2, 5), normal(2, 2), normal(1, 2)], activation="erf"), teacher)
    biased = Network([normal(2, 5), normal(1, 2)], [normal(2), None], activation="erf")
    with pytest.raises(ValueError, match=r"population\.loss: the student has biases.*no closed form.*FunctionLoss"):
        loss(biased, teacher)
    with pytest.raises(ValueError, match="the student is relu, the teacher erf"):
        loss(Network([normal(2, 5), normal(1, 2)]), teacher)
    with pytest.raises(ValueError, match=r"Network\(4-2-1, erf.* is not \(5, 2, 1\) erf"):
        loss(Network([normal(2, 4), normal(1, 2)], activation="erf"), teacher)
    with pytest.raises(ValueError, match="nodes=0; a student has at least one"):
        PopulationLoss(teacher, 0)
